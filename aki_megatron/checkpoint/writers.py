"""Writers of other people's formats that ask a source for one tensor after another.

safetensors (one file, or parts and an index) and files of torch.save. Each file is forced to disk, read back and
compared with what was written; the caller writes into a folder that nobody reads yet and renames it (``aside``).
"""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.dcp_io import HashedStream
from aki_megatron.checkpoint.readers import SAFETENSORS_DTYPES, open_torch_file
from aki_megatron.checkpoint.tensors import TensorSource
from aki_megatron.errors import CheckpointError

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

SHARD_BYTES = 5 * 10**9
"""Size of a part of a Hugging Face folder, as transformers cuts them."""


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``out`` when all went well and is gone when anything did not.

    Errors: CheckpointError when ``out`` is there and not an empty folder, or when the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; choose another --out, or remove it first.")
    out = out.absolute()
    writing = out.parent / f".writing_{out.name}"
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
        yield writing
        files.sync_folder(writing)
        writing.replace(out)  # an empty folder is replaced
        files.sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written: {error}. Nothing is left of it.") from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def write_safetensors(file: Path, source: TensorSource, names: Iterable[str] | None = None) -> None:
    """Write tensors of a source (all of them unless ``names`` says which) as one safetensors file."""
    # wide numbers first, as the safetensors library writes them, so that every tensor is aligned to its element
    wanted = sorted(source.facts if names is None else names, key=lambda name: -source.facts[name].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in wanted:
        fact, start = source.facts[name], end
        end += fact.bytes
        entry = {"dtype": DTYPE_NAMES[fact.dtype], "shape": list(fact.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        into = HashedStream(handle)
        into.write(struct.pack("<Q", len(text)) + text)
        for name in wanted:
            into.write(_bytes(source, name))
        _force(handle)
    _read_back(file, into.sha256.hexdigest())


def write_shards(folder: Path, source: TensorSource, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all tensors of a source as the weights of a Hugging Face folder: one file, or parts and an index.

    A part holds at most ``shard_bytes``, unless a single tensor is larger.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, fact in source.facts.items():
        if shards[-1] and fact.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= fact.bytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", source)
        return
    titles = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for title, names in zip(titles, shards, strict=True):
        write_safetensors(folder / title, source, names)
    index = {
        "metadata": {"total_size": sum(fact.bytes for fact in source.facts.values())},
        "weight_map": {name: title for title, names in zip(titles, shards, strict=True) for name in sorted(names)},
    }
    files.write_json(folder / "model.safetensors.index.json", index)


def write_torch_file(file: Path, source: TensorSource, facts: Mapping[str, Any]) -> None:
    """Write a training checkpoint as torch.save does: ``facts``, and the tensors as ``model_state_dict``.

    torch writes the frame, with room for each tensor; the numbers are put in one tensor at a time.
    """
    # empty tensors: their memory is never touched, so they take none
    state = {name: torch.empty(fact.shape, dtype=fact.dtype) for name, fact in source.facts.items()}
    with torch.serialization.skip_data():
        torch.save({**facts, "model_state_dict": state}, file)
    del state
    written = {}
    with file.open("r+b") as handle:
        for name, place in open_torch_file(file).places.items():
            content = _bytes(source, name)
            handle.seek(place.offset)
            handle.write(content)
            written[name] = hashlib.sha256(content).digest()
        _force(handle)
    for name, place in open_torch_file(file).places.items():
        if hashlib.sha256(_flat(place.read())).digest() != written[name]:
            raise CheckpointError(f"{file}: {name} reads back differently from what was written; check the disk.")


def _bytes(source: TensorSource, name: str) -> memoryview:
    tensor, fact = source.get(name), source.facts[name]
    assert tuple(tensor.shape) == fact.shape and tensor.dtype == fact.dtype, name
    return _flat(tensor)


def _flat(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _force(handle: BinaryIO) -> None:
    handle.flush()
    os.fsync(handle.fileno())


def _read_back(file: Path, sha256: str) -> None:
    if files.digest(file)["sha256"] != sha256:
        raise CheckpointError(f"{file} reads back differently from what was written; check the disk.")
