"""Helpers of the tests of tools/convert.py."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from aki_megatron.checkpoint.dcp_io import CheckpointSource

GOLDEN = Path(__file__).parents[1] / "golden" / "official_aki"

Run = Callable[..., tuple[int, str, str]]
"""The fixture ``convert``."""


def done(result: tuple[int, str, str]) -> str:
    """The output of a command that must succeed."""
    code, printed, errors = result
    assert code == 0, errors
    return printed


def refused(result: tuple[int, str, str], out: Path) -> str:
    """The error of a command that must fail and leave nothing of its output."""
    code, _, errors = result
    assert code == 2
    # a slow machine also prints progress
    assert any(line.startswith("convert: ") for line in errors.splitlines()), errors
    assert not out.exists() and not list(out.parent.glob(".writing_*"))
    return errors


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def all_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    source = CheckpointSource(checkpoint, optimizer_state=True)
    return {name: source.get(name) for name in source.specs}
