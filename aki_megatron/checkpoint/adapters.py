"""Low-rank adapters in checkpoints: merged into the weights they belong to, or written as peft reads them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.tensors import LazyTensors, StoredTensors, TensorSource, TensorSpec
from aki_megatron.checkpoint.writers import write_safetensors
from aki_megatron.config.model import DecoderConfig, ModelConfig
from aki_megatron.config.trainable import LORA_TARGETS, LoraConfig
from aki_megatron.config.yaml_file import read_yaml
from aki_megatron.errors import CheckpointError
from aki_megatron.model.lora import external_targets, fused_sizes
from aki_megatron.model.trainable import ADAPTER

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""Files of an adapter's folder, as peft names them."""

EXTERNAL_PREFIX = "base_model.model.model.language_model.layers."
"""Before the number of a decoder layer in an adapter of the folder that to-hf writes."""

CACHED_ELEMENTS = 2**18
"""Elements of a product that are summed at a time, so that they stay in the processor's cache."""


@dataclass(frozen=True)
class MergedWeights:
    """A TensorSource of a checkpoint's weights, each with its adapters added: those of a model without adapters."""

    path: Path
    specs: Mapping[str, TensorSpec]
    getters: Mapping[str, Callable[[], Tensor]]

    def get(self, name: str) -> Tensor:
        return self.getters[name]()


def merge_adapters(source: StoredTensors, model: ModelConfig) -> StoredTensors:
    """Return the weights of a checkpoint with its adapters merged; the checkpoint itself where it has none."""
    if not any(ADAPTER in name for name in source.specs):
        return source
    lora = checkpoint_lora(source.path)
    scale, decoder = lora.alpha / lora.rank, model.decoder

    def getter(name: str) -> Callable[[], Tensor]:
        parts = layer_adapters(source, name)
        if not parts:
            return lambda: source.get(name)

        def merged() -> Tensor:
            weight = source.get(name)
            return weight + (scale * _product(source, name, parts, decoder)).to(weight.dtype)

        return merged

    specs = {name: spec for name, spec in source.specs.items() if ADAPTER not in name}
    return MergedWeights(source.path, specs, {name: getter(name) for name in specs})


def without_adapters(source: StoredTensors) -> MergedWeights:
    """Return the weights of a checkpoint that are no adapters, as they are."""
    specs = {name: spec for name, spec in source.specs.items() if ADAPTER not in name}
    return MergedWeights(source.path, specs, {name: partial(source.get, name) for name in specs})


def checkpoint_lora(checkpoint: Path) -> LoraConfig:
    """Return rank, scale and targets of a checkpoint's adapters. Raises CheckpointError where it does not say."""
    section = read_yaml(checkpoint / files.CONFIG).values.get("trainable")
    if not isinstance(section, Mapping) or "lora" not in section:
        raise CheckpointError(
            f"{checkpoint} holds low-rank adapters, but its {files.CONFIG} has no section trainable.lora that says how "
            "they are scaled; bring back the file that the run wrote."
        )
    return LoraConfig.model_validate(section["lora"])


def layer_adapters(source: TensorSource, weight: str) -> dict[str, str]:
    """Return target -> name of its adapter, for the weight of a linear layer; empty where it has none."""
    if not weight.endswith("_proj.weight"):
        return {}
    prefix = weight.removesuffix("_proj.weight") + "_lora."
    names = [name for name in source.specs if name.startswith(prefix) and name.endswith(".lora_A.weight")]
    return {name.removeprefix(prefix).partition(".")[0]: name.removesuffix(".lora_A.weight") for name in names}


def _product(source: TensorSource, weight: str, adapters: Mapping[str, str], decoder: DecoderConfig) -> Tensor:
    """Return B A of a layer, float32 [out_features, in_features], zero where a fused map has no adapter.

    The bits are the same on every machine, so that merged weights can be known by their digests: the order in which a
    matrix product adds depends on the processor, that of sums element by element does not.
    """
    layer = weight.split(".", 2)[2].removesuffix("_proj.weight")
    total = torch.zeros(source.specs[weight].shape)
    for target, name in adapters.items():
        first, last = _rows(layer, target, decoder)
        second, matrix = source.get(f"{name}.lora_B.weight").float(), source.get(f"{name}.lora_A.weight").float()
        num_rows = max(1, CACHED_ELEMENTS // matrix.shape[1])
        for part, rows in zip(total[first:last].split(num_rows), second.split(num_rows), strict=True):
            for column, row in zip(rows.unbind(1), matrix, strict=True):
                part += column[:, None] * row
    return total


def _rows(layer: str, target: str, decoder: DecoderConfig) -> tuple[int, int]:
    """Return the first and the end row of a target in a layer's weight."""
    sizes, part = fused_sizes(layer, decoder), LORA_TARGETS[target][1]
    return (0, sum(sizes)) if part is None else (sum(sizes[:part]), sum(sizes[: part + 1]))


def external_adapters(source: TensorSource, decoder: DecoderConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the adapters as the family's Hugging Face model splits its maps: module -> A [r, in], B [out, r].

    Where ours adapts a whole fused layer and the family has several maps, each map gets A and its rows of B. Where ours
    adapts some maps of a layer that the family fuses, their matrices are joined to one adapter of a larger rank.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for weight in source.specs:
        adapters = layer_adapters(source, weight)
        if not adapters:
            continue
        _, number, rest = weight.split(".", 2)
        layer = rest.removesuffix("_proj.weight")
        matrices = [
            (_rows(layer, target, decoder), source.get(f"{n}.lora_A.weight"), source.get(f"{n}.lora_B.weight"))
            for target, n in adapters.items()
        ]
        for target in external_targets(decoder):
            if LORA_TARGETS[target][0] != layer:
                continue
            first, end = _rows(layer, target, decoder)
            inside = [(rows, a, b) for rows, a, b in matrices if rows[0] < end and rows[1] > first]
            if not inside:
                continue
            second = torch.zeros(end - first, sum(len(a) for _, a, _ in inside))
            column = 0
            for (low, high), a, b in inside:
                begin, stop = max(low, first), min(high, end)
                second[begin - first : stop - first, column : column + len(a)] = b[begin - low : stop - low].float()
                column += len(a)
            block = "self_attn" if layer.startswith("attention") else "mlp"
            first_matrix = torch.cat([a.float() for _, a, _ in inside])
            found[f"{EXTERNAL_PREFIX}{number}.{block}.{target}"] = (first_matrix, second)
    return found


def write_adapter(source: StoredTensors, model: ModelConfig, out: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """Write the adapters of a checkpoint as a folder that peft loads onto what to-hf wrote of the base model.

    Return its adapter_config.json. Raises CheckpointError where the checkpoint has none.
    """
    adapters = external_adapters(source, model.decoder)
    if not adapters:
        raise CheckpointError(
            f"{source.path} has no low-rank adapters: its run has trainable.decoder.mode other than lora. Convert it "
            "without --adapter."
        )
    lora = checkpoint_lora(source.path)
    tensors = {
        f"{module}.lora_{letter}.weight": tensor.to(dtype or tensor.dtype).contiguous()
        for module, pair in adapters.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    ranks = {module.removeprefix("base_model.model."): len(pair[0]) for module, pair in adapters.items()}
    other = {module: rank for module, rank in ranks.items() if rank != lora.rank}
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        # not names alone: the vision encoder and the resampler have layers of the same names
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": {module: lora.alpha * rank / lora.rank for module, rank in other.items()},
    }
    getters = {name: partial(tensors.__getitem__, name) for name in tensors}
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / ADAPTER_FILE, LazyTensors(specs, getters))
    files.write_json(out / ADAPTER_CONFIG, config)
    return config
