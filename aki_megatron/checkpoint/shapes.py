"""Names and shapes of a model's tensors, and their comparison with what a file, folder or checkpoint holds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from aki_megatron.checkpoint.tensors import Shape
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import build_model

MAX_LINES = 40
"""Differences that an error lists; it counts the others."""

USE_MATCHING_MODEL = (
    "Choose the folder or file that belongs to the model section of the configuration, or change that section."
)


def meta_parameters(config: ModelConfig) -> dict[str, nn.Parameter]:
    """Every parameter of the whole model by name, on the meta device; tied embeddings are listed once."""
    with torch.device("meta"):
        return dict(build_model(config, attention=AttentionConfig(rule="causal")).named_parameters())


def model_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of the whole model's parameters; allocates nothing."""
    return {name: tuple(parameter.shape) for name, parameter in meta_parameters(config).items()}


def num_parameters(config: ModelConfig) -> int:
    """Number of the whole model's parameters."""
    return sum(parameter.numel() for parameter in meta_parameters(config).values())


@dataclass(frozen=True)
class ShapeComparison:
    """Sorted names of the tensors that differ."""

    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]


def compare_shapes(found: Mapping[str, Shape | None], expected: Mapping[str, Shape]) -> ShapeComparison:
    """Compare the tensors of a source with those that a model needs; a shape of None equals no other."""
    return ShapeComparison(
        missing=sorted(expected.keys() - found.keys()),
        unexpected=sorted(found.keys() - expected.keys()),
        mismatched=sorted(name for name in expected.keys() & found.keys() if found[name] != expected[name]),
    )


def check_shapes(
    found: Mapping[str, Shape], expected: Mapping[str, Shape], source: str, hint: str = USE_MATCHING_MODEL
) -> None:
    """Compare what ``source`` holds with what a model needs.

    Raises CheckpointError with every difference; ``hint`` is its last sentence.
    """
    comparison = compare_shapes(found, expected)
    differences = [f"missing: {name} {expected[name]}" for name in comparison.missing]
    differences += [f"unexpected: {name} {found[name]}" for name in comparison.unexpected]
    differences += [
        f"shape mismatch: {name} is {found[name]}, the model needs {expected[name]}" for name in comparison.mismatched
    ]
    if differences:
        raise mismatch_error(source, differences, hint)


def mismatch_error(source: str, differences: Sequence[str], hint: str) -> CheckpointError:
    """The error of a comparison that failed."""
    lines = [f"  {line}" for line in differences[:MAX_LINES]]
    if len(differences) > MAX_LINES:
        lines.append(f"  and {len(differences) - MAX_LINES} more")
    return CheckpointError(
        f"The tensors of {source} are not those of the model ({len(differences)} differences):\n"
        + "\n".join(lines)
        + f"\n{hint}"
    )
