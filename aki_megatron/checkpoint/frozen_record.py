"""What a checkpoint leaves out because its run never trains it: which tensors, their digests, where they came from.

A checkpoint of a run with ``checkpoint.exclude_frozen_parameters`` holds the file FILE. A digest is the sha256 of the
float32 values of a whole tensor, row-major, so that it depends neither on the layout of the run nor on the precision of
the file that the tensor came from.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aki_megatron.checkpoint.tensors import Shape

FILE = "frozen_parameters.json"
"""The record inside a checkpoint; a checkpoint without it is whole."""

VERSION = 1

MAX_NAMED = 3
"""Tensors that an error names; it counts the others."""

INIT_WEIGHTS = "init.weights"
"""The key of a base that is a checkpoint; the other keys name Hugging Face folders."""


@dataclass(frozen=True)
class FrozenTensor:
    """A tensor that a checkpoint leaves out: the shape of the whole tensor, and the sha256 of its float32 values."""

    shape: Shape
    sha256: str


@dataclass(frozen=True)
class FrozenBase:
    """Where a run took frozen weights from.

    path             as the run's configuration has it
    absolute         the same, absolute, on the machine that ran it
    checkpoint       of init.weights: name of the checkpoint that was taken
    manifest_sha256  of init.weights: sha256 of that checkpoint's manifest
    tensors          by parameter name
    """

    path: str
    absolute: str
    tensors: Mapping[str, FrozenTensor]
    checkpoint: str = ""
    manifest_sha256: str = ""


@dataclass(frozen=True)
class FrozenRecord:
    """The bases of a run by the key of the configuration that names them: ``init.vision``, ``init.weights``, ..."""

    bases: Mapping[str, FrozenBase]

    @property
    def tensors(self) -> dict[str, FrozenTensor]:
        """Every tensor that is left out, by parameter name."""
        return {name: tensor for base in self.bases.values() for name, tensor in base.tensors.items()}

    def to_json(self) -> str:
        """Return the content of FILE."""
        bases = {
            key: {
                "path": base.path,
                "absolute": base.absolute,
                "checkpoint": base.checkpoint,
                "manifest_sha256": base.manifest_sha256,
                "tensors": {name: [list(each.shape), each.sha256] for name, each in base.tensors.items()},
            }
            for key, base in self.bases.items()
        }
        return json.dumps({"version": VERSION, "bases": bases})


def read_record(checkpoint: Path | None) -> FrozenRecord | None:
    """Return the record of a checkpoint; None where it leaves nothing out.

    A damaged file counts as none: whatever opens the checkpoint verifies its files first, or finds tensors missing.
    """
    if checkpoint is None:
        return None
    try:
        content = json.loads((checkpoint / FILE).read_text(encoding="utf-8"))
        return FrozenRecord({str(key): _read_base(base) for key, base in content["bases"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _read_base(content: Mapping[str, Any]) -> FrozenBase:
    tensors = {
        str(name): FrozenTensor(tuple(int(size) for size in shape), str(sha256))
        for name, (shape, sha256) in content["tensors"].items()
    }
    texts = (str(content[key]) for key in ("checkpoint", "manifest_sha256"))
    return FrozenBase(str(content["path"]), str(content["absolute"]), tensors, *texts)


def tensor_sha256(tensor: Tensor) -> str:
    """Return the sha256 of a whole tensor's float32 values, row-major, little-endian."""
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(values.flatten().view(torch.uint8).numpy().data).hexdigest()


def name_some(names: Collection[str]) -> str:
    """Return the first few names and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_NAMED} more" if len(ordered) > MAX_NAMED else ""
    return ", ".join(ordered[:MAX_NAMED]) + more
