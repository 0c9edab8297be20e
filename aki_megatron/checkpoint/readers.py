"""Tensors in files of others, read one at a time: safetensors (a file or a folder) and files of torch.save.

Nothing is mapped into memory and nothing is unpickled but torch's own list of tensors: a header says where each tensor
lies, and ``get`` reads these bytes. So a file may be larger than the machine's memory.
"""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aki_megatron.checkpoint.tensors import Shape, TensorFact, TensorSource, View
from aki_megatron.errors import CheckpointError

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Numbers that weights are stored in, by the names of safetensors."""

LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: its first element ``offset`` bytes into ``file``, elements apart by ``stride``."""

    file: Path
    offset: int
    fact: TensorFact
    stride: Shape

    def read(self) -> Tensor:
        """The tensor, whole and contiguous.

        Errors: CheckpointError when the file ends before it.
        """
        # elements of a transposed tensor lie among each other: read from the first to the last
        last = sum((size - 1) * step for size, step in zip(self.fact.shape, self.stride, strict=True))
        flat = torch.empty(last + 1 if self.fact.elements else 0, dtype=self.fact.dtype)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            got = file.readinto(flat.view(torch.uint8).numpy().data)
        if got != flat.nbytes:
            raise CheckpointError(f"{self.file} is cut off inside a tensor; fetch it again.")
        return flat.as_strided(self.fact.shape, self.stride).contiguous()


@dataclass(frozen=True)
class Places:
    """A source of tensors that lie in files. ``path`` is what the user named."""

    path: Path
    places: Mapping[str, Place]

    @property
    def facts(self) -> Mapping[str, TensorFact]:
        """See TensorSource.facts."""
        return {name: place.fact for name, place in self.places.items()}

    def get(self, name: str) -> Tensor:
        """See TensorSource.get."""
        return self.places[name].read()


def open_safetensors(path: Path) -> Places:
    """The tensors of a safetensors file, or of a folder with one or with all parts of one.

    Errors: CheckpointError when a file is missing or damaged, holds quantized weights, or when two files hold a tensor
    of the same name.
    """
    places: dict[str, Place] = {}
    for file in [path] if path.is_file() else weight_files(path):
        for name, place in _header(file).items():
            if name in places:
                raise CheckpointError(f"{name} is in {places[name].file.name} and in {file}; one of them is too many.")
            places[name] = place
    return Places(path, places)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or model-00001-of-0000N.safetensors and so on.

    Errors: CheckpointError when there are none or some are missing.
    """
    single, parts = folder / "model.safetensors", sorted(folder.glob("model-*-of-*.safetensors"))
    if single.is_file():
        return [single]
    if not parts:
        pickles = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth"))
        raise CheckpointError(
            f"{folder} holds no weights: looked for model.safetensors and model-00001-of-0000N.safetensors. "
            + (f"Pickle files ({', '.join(pickles)}) are not read; convert them to safetensors." if pickles else "")
        )
    count = int(parts[0].stem.rsplit("-", 1)[1])
    wanted = [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if len({part.stem.rsplit("-", 1)[1] for part in parts}) > 1:
        raise CheckpointError(f"{folder} holds weight files of two models: {', '.join(part.name for part in parts)}.")
    if missing := [file.name for file in wanted if not file.is_file()]:
        raise CheckpointError(
            f"{folder} is incomplete: of {count} weight files these are missing: {', '.join(missing)}. Fetch them."
        )
    return wanted


def _header(file: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies: eight bytes of length, as many of JSON, then the numbers."""
    unreadable = f"{file} is not a readable safetensors file; fetch it again."
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > LONGEST_HEADER:
                raise CheckpointError(unreadable)
            listed = json.loads(handle.read(length))
        places = {
            name: _safetensors_place(file, name, entry, 8 + length)
            for name, entry in listed.items()
            if name != "__metadata__"
        }
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(unreadable) from None
    end = max((place.offset + place.fact.bytes for place in places.values()), default=0)
    if file.stat().st_size < end:
        raise CheckpointError(f"{file} is cut off: it has {file.stat().st_size} of {end} bytes; fetch it again.")
    return places


def _safetensors_place(file: Path, name: str, entry: Mapping[str, Any], start: int) -> Place:
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise CheckpointError(
            f"{file}: {name} is stored as {entry['dtype']}, weights are read from {', '.join(SAFETENSORS_DTYPES)}. "
            "Quantized folders are not read; give the folder of the full-precision model."
        )
    fact = TensorFact(tuple(entry["shape"]), SAFETENSORS_DTYPES[entry["dtype"]])
    first, end = entry["data_offsets"]
    if end - first != fact.bytes:
        raise ValueError(name)
    return Place(file, start + first, fact, contiguous_stride(fact.shape))


def open_torch_file(file: Path) -> Places:
    """The tensors of a file of torch.save: a state dict, or a training checkpoint with one as ``model_state_dict``.

    ``module.`` in names, which wrappers of distributed training leave behind, is taken out.

    Errors: CheckpointError when it is no such file, or holds anything but tensors and plain values.
    """
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file} is not a readable file of torch.save (torch >= 1.6); fetch it again, or save it again with a "
            "newer torch, or give safetensors."
        )
    try:
        content = torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or holds more than tensors and plain values, and such a file is not unpickled "
            f"({str(error).splitlines()[0]}). Save its model_state_dict alone, or as safetensors."
        ) from None
    state = content.get("model_state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} holds neither a state dict nor one under the name model_state_dict.")
    known = _record_starts(file)
    places: dict[str, Place] = {}
    for name, tensor in state.items():
        plain = name.replace("module.", "")
        if plain in places:
            raise CheckpointError(f"{file} holds {plain} twice, once with module. in its name.")
        # where torch says the numbers begin; trusted only where the zip file's own list agrees
        start = tensor.untyped_storage()._checkpoint_offset
        if start not in known:
            raise CheckpointError(f"{file}: the numbers of {name} cannot be found; save it again as safetensors.")
        fact = TensorFact(tuple(tensor.shape), tensor.dtype)
        places[plain] = Place(file, start + tensor.storage_offset() * tensor.itemsize, fact, tensor.stride())
    return Places(file, places)


def _record_starts(file: Path) -> set[int]:
    """Where the records of a zip file begin: after a local header of 30 bytes, a name and an extra field."""
    starts = set()
    with zipfile.ZipFile(file) as archive, file.open("rb") as handle:
        for record in archive.infolist():
            handle.seek(record.header_offset + 26)
            starts.add(record.header_offset + 30 + sum(struct.unpack("<HH", handle.read(4))))
    return starts


def contiguous_stride(shape: Shape) -> Shape:
    """Strides of a tensor whose last axis lies together."""
    return tuple(torch.empty(shape, device="meta").stride())


def cast(source: TensorSource, dtype: torch.dtype) -> View:
    """The same tensors in another precision."""

    return View(
        {name: TensorFact(fact.shape, dtype) for name, fact in source.facts.items()},
        {name: lambda name=name: source.get(name).to(dtype) for name in source.facts},  # type: ignore[misc]
    )


def only(source: TensorSource, names: Collection[str]) -> View:
    """Some tensors of a source, in this order."""
    return View(
        {name: source.facts[name] for name in names},
        {name: lambda name=name: source.get(name) for name in names},  # type: ignore[misc]
    )


def merged(*sources: TensorSource) -> View:
    """The tensors of several sources; no two of them hold one of the same name."""
    facts: dict[str, TensorFact] = {}
    makers: dict[str, Callable[[], Tensor]] = {}
    for source in sources:
        assert not facts.keys() & source.facts.keys()
        facts |= source.facts
        makers |= {name: lambda source=source, name=name: source.get(name) for name in source.facts}  # type: ignore[misc]
    return View(facts, makers)


@dataclass(frozen=True)
class ProgressSource:
    """A source that tells ``saw`` the size in bytes of each tensor that is read."""

    source: TensorSource
    saw: Callable[[int], None]

    @property
    def facts(self) -> Mapping[str, TensorFact]:
        """See TensorSource.facts."""
        return self.source.facts

    def get(self, name: str) -> Tensor:
        """See TensorSource.get."""
        tensor = self.source.get(name)
        self.saw(tensor.nbytes)
        return tensor
