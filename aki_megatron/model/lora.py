"""Low-rank adapters (LoRA, Hu et al., 2021) beside the decoder's linear maps: y = W x + alpha / rank * B A x.

A layer that fuses several maps has an adapter for each map that is a target, or one for all of it. Under tensor
parallelism A [rank, in_features] is whole and B [out_features, rank] is split beside a column layer, as the layer is;
beside a row layer A is split and B whole. Either way what is split is a column or a row layer of the LinearFactory,
which sums gradients and outputs over the tensor ranks. Initial values as in peft: A by Kaiming's uniform distribution,
B zero; they do not depend on the layout.

Names: ``layers.0.attention.qkv_lora.q_proj.lora_A.weight``.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from aki_megatron.config.model import DecoderConfig
from aki_megatron.config.trainable import LORA_TARGETS, LoraConfig
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.linears import LinearFactory
from aki_megatron.model.sharding import gate_up_sizes, qkv_sizes

ADAPTED_LAYERS = ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
"""Layers that can have adapters, without ``_proj`` at the end; their adapters end in ``_lora`` instead."""


def lora_targets(lora: LoraConfig, config: DecoderConfig) -> tuple[str, ...]:
    """Return the targets, those of the family's Hugging Face model where the configuration names none."""
    return lora.targets or external_targets(config)


def external_targets(config: DecoderConfig) -> tuple[str, ...]:
    """Return every linear map of a decoder layer as the family's Hugging Face model has it: fused, or one by one."""
    names = {rule.native: rule.external for rule in FAMILIES[config.family].weights.layer_rules}
    found: list[str] = []
    for layer in ADAPTED_LAYERS:
        found += [name.split(".")[-2] for name in names[f"{layer}_proj.weight"]]
    return tuple(found)


def fused_sizes(layer: str, config: DecoderConfig) -> tuple[int, ...]:
    """Return the output features of the maps that a layer fuses; one number where it fuses none."""
    if layer == "attention.qkv":
        return qkv_sizes(config)
    return gate_up_sizes(config) if layer == "mlp.gate_up" else (config.hidden_size,)


class LowRank(nn.Module):
    """x -> B A x."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.lora_A = first
        self.lora_B = second

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], of a split layer those of this tensor rank."""
        return self.lora_B(self.lora_A(x))


class Adapters(nn.ModuleDict):
    """The adapters of one layer by target. Call it with the layer's input; it returns what to add to its output."""

    def __init__(self, adapters: dict[str, LowRank], *, scale: float, sizes: Sequence[int]) -> None:
        """
        scale  alpha / rank
        sizes  of the maps that the layer fuses
        """
        super().__init__(adapters)
        self.scale = scale
        self.sizes = tuple(sizes)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], zero where a map has no adapter."""
        by_part = {LORA_TARGETS[target][1]: adapter(x) for target, adapter in self.items()}
        if None in by_part:
            return by_part[None] * self.scale
        width, whole = next((out.shape[-1], self.sizes[part]) for part, out in by_part.items() if part is not None)
        parts = [
            by_part[part] if part in by_part else x.new_zeros(*x.shape[:-1], size * width // whole)
            for part, size in enumerate(self.sizes)
        ]
        return torch.cat(parts, dim=-1) * self.scale


def build_adapters(layer: str, config: DecoderConfig, lora: LoraConfig, linears: LinearFactory) -> Adapters | None:
    """Build the adapters of one of ADAPTED_LAYERS; None where it has no target."""
    targets = [target for target in lora_targets(lora, config) if LORA_TARGETS[target][0] == layer]
    sizes, adapters = fused_sizes(layer, config), dict[str, LowRank]()
    for target in targets:
        part = LORA_TARGETS[target][1]
        if layer in ("attention.qkv", "mlp.gate_up"):
            parts = sizes if part is None else (sizes[part],)
            whole = nn.Linear(config.hidden_size, lora.rank, bias=False)
            _init_first(whole.weight)
            first: nn.Module = whole
            second = linears.column(lora.rank, sum(parts), bias=False, std=0.0, part_sizes=parts)
        else:
            in_features = config.intermediate_size if layer == "mlp.down" else config.attention_size
            first = linears.row(in_features, lora.rank, bias=False, std=0.0, init=_init_first)
            second = nn.Linear(lora.rank, config.hidden_size, bias=False)
            nn.init.zeros_(second.weight)
        adapters[target] = LowRank(first, second)
    return Adapters(adapters, scale=lora.alpha / lora.rank, sizes=sizes) if adapters else None


def _init_first(weight: Tensor) -> None:
    """Fill A as peft does."""
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
