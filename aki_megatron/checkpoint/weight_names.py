"""Weights under other names: the table of rules.

A rule is a row (our name, their names); ``{i}`` stands for the layer number. The same rows serve Hugging Face folders
and the official AKI release, which differ in what they put in front of their names. Several of their names: we hold
these tensors as one, put together along axis 0 in this order (checkpoint/tensors.py does it).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from aki_megatron.checkpoint.tensors import NameTable, Shape
from aki_megatron.config.model import DecoderConfig, ModelConfig, VisionConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import build_model


@dataclass(frozen=True, init=False)
class WeightRule:
    """One tensor of ours, or one per layer, and theirs: one of the same values, or several that are its parts."""

    ours: str
    theirs: tuple[str, ...]

    def __init__(self, ours: str, *theirs: str) -> None:
        object.__setattr__(self, "ours", ours)
        object.__setattr__(self, "theirs", theirs)


def linear(ours: str, theirs: str) -> tuple[WeightRule, WeightRule]:
    """Weight and bias of a layer that no rank splits."""
    return WeightRule(f"{ours}.weight", f"{theirs}.weight"), WeightRule(f"{ours}.bias", f"{theirs}.bias")


VISION_LAYER_RULES = (
    *linear("front.vision.blocks.{i}.attention_norm", "encoder.layers.{i}.layer_norm1"),
    *linear("front.vision.blocks.{i}.attention.query", "encoder.layers.{i}.self_attn.q_proj"),
    *linear("front.vision.blocks.{i}.attention.key", "encoder.layers.{i}.self_attn.k_proj"),
    *linear("front.vision.blocks.{i}.attention.value", "encoder.layers.{i}.self_attn.v_proj"),
    *linear("front.vision.blocks.{i}.attention.out", "encoder.layers.{i}.self_attn.out_proj"),
    *linear("front.vision.blocks.{i}.feed_forward_norm", "encoder.layers.{i}.layer_norm2"),
    *linear("front.vision.blocks.{i}.feed_forward.up", "encoder.layers.{i}.mlp.fc1"),
    *linear("front.vision.blocks.{i}.feed_forward.down", "encoder.layers.{i}.mlp.fc2"),
)

VISION_RULES = (
    *linear("front.vision.patch_embedding", "embeddings.patch_embedding"),
    WeightRule("front.vision.position_embedding", "embeddings.position_embedding.weight"),
    *linear("front.vision.norm", "post_layernorm"),
)

POOLING_RULES = (
    WeightRule("front.vision.pooling.probe", "head.probe"),
    WeightRule("front.vision.pooling.attention.in_proj_weight", "head.attention.in_proj_weight"),
    WeightRule("front.vision.pooling.attention.in_proj_bias", "head.attention.in_proj_bias"),
    *linear("front.vision.pooling.attention.out_proj", "head.attention.out_proj"),
    *linear("front.vision.pooling.norm", "head.layernorm"),
    *linear("front.vision.pooling.feed_forward.up", "head.mlp.fc1"),
    *linear("front.vision.pooling.feed_forward.down", "head.mlp.fc2"),
)

_NORMS_AND_OUTPUTS = (
    WeightRule("blocks.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    WeightRule("blocks.{i}.attention.out.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    WeightRule("blocks.{i}.feed_forward_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    WeightRule("blocks.{i}.feed_forward.down.weight", "model.layers.{i}.mlp.down_proj.weight"),
)
_FUSED = (
    WeightRule("blocks.{i}.attention.qkv.weight", "model.layers.{i}.self_attn.qkv_proj.weight"),
    WeightRule("blocks.{i}.feed_forward.gate_up.weight", "model.layers.{i}.mlp.gate_up_proj.weight"),
)
_SEPARATE = (
    WeightRule(
        "blocks.{i}.attention.qkv.weight",
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    WeightRule(
        "blocks.{i}.feed_forward.gate_up.weight",
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
)
_QKV_BIAS = WeightRule(
    "blocks.{i}.attention.qkv.bias",
    "model.layers.{i}.self_attn.q_proj.bias",
    "model.layers.{i}.self_attn.k_proj.bias",
    "model.layers.{i}.self_attn.v_proj.bias",
)
_QK_NORMS = (
    WeightRule("blocks.{i}.attention.query_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    WeightRule("blocks.{i}.attention.key_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
)

LANGUAGE_LAYER_RULES: dict[str, tuple[WeightRule, ...]] = {
    "phi3": (*_NORMS_AND_OUTPUTS, *_FUSED),
    "llama": (*_NORMS_AND_OUTPUTS, *_SEPARATE),
    "qwen2": (*_NORMS_AND_OUTPUTS, *_SEPARATE, _QKV_BIAS),
    "qwen3": (*_NORMS_AND_OUTPUTS, *_SEPARATE, *_QK_NORMS),
}
"""Family of decoders (config/model.py) -> the tensors of one of its layers."""

LANGUAGE_RULES = (
    WeightRule("front.embedding.table.weight", "model.embed_tokens.weight"),
    WeightRule("head.norm.weight", "model.norm.weight"),
)

HEAD_RULES = (WeightRule("head.output.weight", "lm_head.weight"),)
"""Of a language model whose head is not tied to its embedding; a tied one has no such tensor."""


def names(rules: Iterable[WeightRule], *, prefix: str = "", layers: int | None = None) -> dict[str, tuple[str, ...]]:
    """Our names to theirs, ``prefix`` put before theirs; one entry per layer for rules with ``{i}``."""
    numbers = [""] if layers is None else [str(number) for number in range(layers)]
    return {
        rule.ours.replace("{i}", number): tuple(prefix + name.replace("{i}", number) for name in rule.theirs)
        for number in numbers
        for rule in rules
    }


def language_names(config: DecoderConfig, prefix: str = "") -> NameTable:
    """The tensors of a stock language model of the decoder's family: what AKI adds to it is not among them."""
    rules = LANGUAGE_RULES if config.tie_word_embeddings else (*LANGUAGE_RULES, *HEAD_RULES)
    return names(rules, prefix=prefix) | names(
        LANGUAGE_LAYER_RULES[config.family], prefix=prefix, layers=config.num_layers
    )


def vision_names(config: VisionConfig, prefix: str) -> NameTable:
    """The tensors of a SigLIP encoder, its pooling head among them where the configuration has one."""
    rules = (*VISION_RULES, *POOLING_RULES) if config.pooling_head else VISION_RULES
    return names(rules, prefix=prefix) | names(VISION_LAYER_RULES, prefix=prefix, layers=config.num_layers)


def model_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of the whole model's tensors, what a tied head shares once; nothing is allocated."""
    with torch.device("meta"):
        model = build_model(config, rule="causal")
    return {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}


def check_shapes(got: Mapping[str, Shape], wanted: Mapping[str, Shape], source: str) -> None:
    """Raise CheckpointError with every name that is missing, not known, or of another shape."""
    complaints = [f"  missing: {name} {wanted[name]}" for name in sorted(wanted.keys() - got.keys())]
    complaints += [f"  not known: {name} {got[name]}" for name in sorted(got.keys() - wanted.keys())]
    complaints += [
        f"  other shape: {name} is {got[name]}, the model needs {wanted[name]}"
        for name in sorted(wanted.keys() & got.keys())
        if got[name] != wanted[name]
    ]
    if complaints:
        shown = complaints[:40] + ([f"  and {len(complaints) - 40} more"] if len(complaints) > 40 else [])
        raise CheckpointError(
            f"The tensors of {source} are not those of the configured model ({len(complaints)} differences):\n"
            + "\n".join(shown)
            + "\nChoose the folder or file that belongs to the model section of the configuration, or change that."
        )
