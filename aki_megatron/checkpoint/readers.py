"""Readers of other projects' weight files, one tensor at a time: safetensors (a file or a folder) and torch.save files.

The libraries parse and validate the headers; ``get`` then reads the bytes of one tensor with an ordinary read. Their
own lazy readers map the file into memory instead: a file that is truncated while it is mapped kills the process with
SIGBUS where a read raises an error, and mapped pages count as memory of the process, up to the size of the file.
"""

import pickle
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from aki_megatron.checkpoint.foreign_files import kind_of, refuse_adapter_names, refuse_other_folder, refuse_pointer
from aki_megatron.checkpoint.tensors import Shape, TensorSpec, require_finite
from aki_megatron.checkpoint.weight_names import is_buffer
from aki_megatron.errors import CheckpointError

SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that weights are read and written in, by their safetensors names."""

_BUFFER_DTYPES = {"I64": torch.int64, "BOOL": torch.bool}
"""Dtypes of tensors that are no weights and are never quantized ones; matching refuses them as weights."""
_SMALL_DTYPES = {"I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
"""Dtypes that hold buffers or quantized weights: the name tells."""
_QUANTIZED_NAMES = (".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", ".weight_scale", ".weight_scale_inv")


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor is stored: its first element ``offset`` bytes into ``file``, with ``stride`` in elements."""

    file: Path
    offset: int
    spec: TensorSpec
    stride: Shape

    def read(self) -> Tensor:
        """Read the tensor; the result is contiguous. Raises CheckpointError where the file ends inside it."""
        # a transposed tensor's elements interleave: read everything from its first to its last element
        last = sum((size - 1) * step for size, step in zip(self.spec.shape, self.stride, strict=True))
        flat = torch.empty(last + 1 if self.spec.numel else 0, dtype=self.spec.dtype)
        with self.file.open("rb") as file:
            file.seek(self.offset)
            count = file.readinto(flat.view(torch.uint8).numpy().data)
        if count != flat.nbytes:
            raise CheckpointError(f"{self.file} is cut off inside a tensor; fetch it again.")
        return flat.as_strided(self.spec.shape, self.stride).contiguous()


@dataclass(frozen=True)
class FileTensors:
    """A TensorSource of tensors stored in files; ``path`` is the file or folder that was opened."""

    path: Path
    locations: Mapping[str, TensorLocation]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: location.spec for name, location in self.locations.items()}

    def get(self, name: str) -> Tensor:
        others = (
            (other, location.read())
            for other, location in self.locations.items()
            if other != name and location.spec.dtype.is_floating_point
        )
        return require_finite(self.locations[name].read(), name, self.locations[name].file, others)


def open_safetensors(path: Path) -> FileTensors:
    """The tensors of a safetensors file, or of a folder with one file or with all shards of a model.

    Raises CheckpointError where a file is missing or damaged, where it holds quantized weights or a LoRA adapter, or
    where two files hold a tensor of the same name.
    """
    locations: dict[str, TensorLocation] = {}
    for file in [path] if path.is_file() else weight_files(path):
        for name, location in _safetensors_locations(file).items():
            if name in locations:
                raise CheckpointError(
                    f"{name} is in {locations[name].file.name} and in {file}; remove the file that does not belong."
                )
            locations[name] = location
    refuse_adapter_names(path, locations)
    return FileTensors(path, locations)


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or model-00001-of-0000N.safetensors and so on.

    Raises CheckpointError where there are none, or where some of the shards are missing.
    """
    single, shards = folder / "model.safetensors", sorted(folder.glob("model-*-of-*.safetensors"))
    if single.is_file():
        return [single]
    if not shards:
        refuse_other_folder(folder)
        pickles = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".pt", ".pth"))
        raise CheckpointError(
            f"{folder} holds no weights: looked for model.safetensors and model-00001-of-0000N.safetensors. "
            + (f"Pickle files ({', '.join(pickles)}) are not read; convert them to safetensors." if pickles else "")
        )
    count = int(shards[0].stem.rsplit("-", 1)[1])
    expected = [folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if len({shard.stem.rsplit("-", 1)[1] for shard in shards}) > 1:
        names = ", ".join(shard.name for shard in shards)
        raise CheckpointError(f"{folder} holds weight files of two models: {names}; remove those that do not belong.")
    if missing := [file.name for file in expected if not file.is_file()]:
        raise CheckpointError(
            f"{folder} is incomplete: of {count} weight files these are missing: {', '.join(missing)}. Fetch them."
        )
    return expected


def _safetensors_locations(file: Path) -> dict[str, TensorLocation]:
    """Where each tensor of a safetensors file is stored.

    safe_open accepts a file only if its tensors follow each other without gaps and fill the rest of it, so their order
    and sizes give the offsets.
    """
    try:
        refuse_pointer(file)
        with safe_open(file, framework="pt") as header:
            entries = {name: header.get_slice(name) for name in header.offset_keys()}
            specs = {
                name: _spec(file, name, entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries.items()
            }
        offset = file.stat().st_size - sum(spec.nbytes for spec in specs.values())
    except (SafetensorError, OSError) as error:
        kind = f", but {kind_of(file)}" if file.is_file() else ""
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}){kind}; fetch it again.") from None
    locations = {}
    for name, spec in specs.items():
        locations[name] = TensorLocation(file, offset, spec, contiguous_stride(spec.shape))
        offset += spec.nbytes
    return locations


def _spec(file: Path, name: str, dtype: str, shape: Shape) -> TensorSpec:
    readable = SAFETENSORS_DTYPES | _BUFFER_DTYPES | (_SMALL_DTYPES if is_buffer(name) else {})
    if dtype not in readable or name.endswith(_QUANTIZED_NAMES):
        raise CheckpointError(
            f"{file}: {name} is stored as {dtype}; weights are read from {', '.join(SAFETENSORS_DTYPES)}. "
            "Quantized folders are not read; give the folder of the full-precision model."
        )
    return TensorSpec(shape, readable[dtype])


def open_torch_file(file: Path) -> FileTensors:
    """The tensors of a torch.save file: a state dict, or a training checkpoint with one as ``model_state_dict``.

    ``module.``, which wrappers of distributed training leave in names, is removed.

    Raises CheckpointError where it is no such file, or where it holds anything but tensors and plain values.
    """
    refuse_pointer(file)
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
    refuse_adapter_names(file, state)
    record_offsets = _record_offsets(file)
    locations: dict[str, TensorLocation] = {}
    for stored_name, tensor in state.items():
        name = stored_name.replace("module.", "")
        if name in locations:
            raise CheckpointError(f"{file} holds {name} twice, once with module. in its name.")
        # private to torch, so trusted only where the zip directory agrees
        offset = tensor.untyped_storage()._checkpoint_offset
        if offset not in record_offsets:
            raise CheckpointError(f"{file}: the data of {stored_name} cannot be located; save it again as safetensors.")
        spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
        locations[name] = TensorLocation(
            file, offset + tensor.storage_offset() * tensor.itemsize, spec, tensor.stride()
        )
    return FileTensors(file, locations)


def _record_offsets(file: Path) -> set[int]:
    """Where the data of each zip record begins: after its local header of 30 bytes, its name and its extra field."""
    offsets = set()
    with zipfile.ZipFile(file) as archive, file.open("rb") as handle:
        for record in archive.infolist():
            handle.seek(record.header_offset + 26)
            offsets.add(record.header_offset + 30 + sum(struct.unpack("<HH", handle.read(4))))
    return offsets


def contiguous_stride(shape: Shape) -> Shape:
    """Strides, in elements, of a contiguous tensor."""
    return tuple(torch.empty(shape, device="meta").stride())
