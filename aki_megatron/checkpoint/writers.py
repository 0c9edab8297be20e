"""Writers of other projects' weight files: safetensors (one file, or shards with an index) and torch.save files.

A writer asks a source for one tensor after another. Each file is forced to disk, read back and compared with what was
written. Callers write into a ``staging_dir``, which is renamed once everything is in it.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.dcp_io import HashingWriter
from aki_megatron.checkpoint.readers import SAFETENSORS_DTYPES, open_torch_file
from aki_megatron.checkpoint.staging import staging_dir
from aki_megatron.checkpoint.tensors import TensorSource, total_bytes
from aki_megatron.errors import CheckpointError

__all__ = ["SHARD_BYTES", "staging_dir", "write_safetensors", "write_shards", "write_torch_file"]

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

SHARD_BYTES = 5 * 10**9
"""Default size of a shard of a Hugging Face folder, as in transformers."""


def write_safetensors(file: Path, source: TensorSource, names: Iterable[str] | None = None) -> None:
    """Write tensors of a source (all of them, or ``names``) as one safetensors file.

    The library's save_file takes tensors, all of them in memory; this asks for one at a time.

    Raises CheckpointError where the file does not read back as it was written.
    """
    # widest dtypes first, as the safetensors library writes them, so that every tensor is aligned to its elements
    ordered = sorted(source.specs if names is None else names, key=lambda name: -source.specs[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        spec, start = source.specs[name], end
        end += spec.nbytes
        entry = {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        stream = HashingWriter(handle)
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in ordered:
            stream.write(_tensor_bytes(source, name))
        _force_to_disk(handle)
    if files.file_digest(file) != stream.digest():
        raise CheckpointError(f"{file} reads back differently from what was written; check the disk.")


def write_shards(folder: Path, source: TensorSource, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all tensors of a source as the weights of a Hugging Face folder: one file, or shards with an index.

    A shard holds at most ``shard_bytes``, unless a single tensor is larger.
    """
    shards: list[list[str]] = [[]]
    free_bytes = shard_bytes
    for name, spec in source.specs.items():
        if shards[-1] and spec.nbytes > free_bytes:
            shards.append([])
            free_bytes = shard_bytes
        shards[-1].append(name)
        free_bytes -= spec.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", source)
        return
    file_names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file_name, names in zip(file_names, shards, strict=True):
        write_safetensors(folder / file_name, source, names)
    weight_map = {name: file for file, names in zip(file_names, shards, strict=True) for name in sorted(names)}
    index = {"metadata": {"total_size": total_bytes(source)}, "weight_map": weight_map}
    files.write_json(folder / "model.safetensors.index.json", index)


def write_torch_file(file: Path, source: TensorSource, metadata: Mapping[str, Any]) -> None:
    """Write a training checkpoint as torch.save does: ``metadata``, and the tensors as ``model_state_dict``.

    torch writes the file with space for each tensor; the tensors are then filled in one at a time.

    Raises CheckpointError where a tensor does not read back as it was written.
    """
    # uninitialized tensors: their memory is never touched, so none is allocated
    state = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in source.specs.items()}
    with torch.serialization.skip_data():
        torch.save({**metadata, "model_state_dict": state}, file)
    del state
    written = {}
    with file.open("r+b") as handle:
        for name, location in open_torch_file(file).locations.items():
            content = _tensor_bytes(source, name)
            handle.seek(location.offset)
            handle.write(content)
            written[name] = hashlib.sha256(content).digest()
        _force_to_disk(handle)
    for name, location in open_torch_file(file).locations.items():
        if hashlib.sha256(_as_bytes(location.read())).digest() != written[name]:
            raise CheckpointError(f"{file}: {name} reads back differently from what was written; check the disk.")


def _tensor_bytes(source: TensorSource, name: str) -> memoryview:
    tensor, spec = source.get(name), source.specs[name]
    assert tuple(tensor.shape) == spec.shape and tensor.dtype == spec.dtype, name
    return _as_bytes(tensor)


def _as_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _force_to_disk(handle: BinaryIO) -> None:
    handle.flush()
    os.fsync(handle.fileno())
