"""Weights under other names: the table of rules, and strict reading of safetensors files.

A rule is a row (our name, their name); ``{i}`` stands for the layer number. The same rows serve Hugging Face folders
and the official AKI release, which differ in what they put in front of their names.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aki_megatron.config.model import ModelConfig
from aki_megatron.flow import CheckpointError
from aki_megatron.model.stage import build_model

Shape = tuple[int, ...]


@dataclass(frozen=True)
class WeightRule:
    """One tensor, or one per layer, under two names; values and shape are the same."""

    ours: str
    theirs: str


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

DECODER_LAYER_RULES = (
    WeightRule("blocks.{i}.attention_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    WeightRule("blocks.{i}.attention.qkv.weight", "model.layers.{i}.self_attn.qkv_proj.weight"),
    WeightRule("blocks.{i}.attention.out.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    WeightRule("blocks.{i}.feed_forward_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    WeightRule("blocks.{i}.feed_forward.gate_up.weight", "model.layers.{i}.mlp.gate_up_proj.weight"),
    WeightRule("blocks.{i}.feed_forward.down.weight", "model.layers.{i}.mlp.down_proj.weight"),
)

DECODER_RULES = (
    WeightRule("front.embedding.table.weight", "model.embed_tokens.weight"),
    WeightRule("head.norm.weight", "model.norm.weight"),
    WeightRule("head.output.weight", "lm_head.weight"),
)


def names(rules: Iterable[WeightRule], *, prefix: str = "", layers: int | None = None) -> dict[str, str]:
    """Our names to theirs, ``prefix`` put before theirs; one entry per layer for rules with ``{i}``."""
    numbers = [""] if layers is None else [str(number) for number in range(layers)]
    return {
        rule.ours.replace("{i}", number): prefix + rule.theirs.replace("{i}", number)
        for number in numbers
        for rule in rules
    }


def model_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of the whole model's tensors; nothing is allocated."""
    with torch.device("meta"):
        model = build_model(config, rule="causal")
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


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


class TensorFiles:
    """The tensors of a safetensors file, or of a folder with one or with several and an index; read one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path] if path.is_file() else _files(path)
        self.shapes: dict[str, Shape] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  the reader is no mapping
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())
                    self._file_of[name] = file

    def read(self, wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, file by file, so that one file is open at a time."""
        asked = set(wanted)
        for file in self.files:
            with _open(file) as tensors:
                for name in sorted(name for name in asked if self._file_of[name] == file):
                    yield name, tensors.get_tensor(name)


def _files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    files = sorted(folder.glob("model-*-of-*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder} holds no weights: looked for model.safetensors and model-00001-of-0000N.safetensors. "
            "Weights in pickle files (.bin, .pt) are not read; convert them to safetensors."
        )
    count = int(files[0].stem.rsplit("-", 1)[1])
    wanted = [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    missing = [file.name for file in wanted if not file.is_file()]
    if missing or len(files) != count:
        raise CheckpointError(f"{folder} is incomplete: of {count} weight files {missing} are missing.")
    return wanted


def _open(file: Path) -> safe_open:
    try:
        return safe_open(str(file), "pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}); fetch it again.") from error
