"""Checkpoints in the format of torch.distributed.checkpoint (DCP), read and written one tensor at a time.

What is written is hashed on the way to disk and read back before it counts. What is read is verified against the
manifest. Only tensors (``weights_only``) and torch's index are unpickled, the index with an unpickler that accepts
nothing but the classes of an index.
"""

import hashlib
import os
import pickle
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSource, TensorSpec, require_finite, to_native
from aki_megatron.errors import BaseWeightsError, CheckpointError

WEIGHT = "weight."
"""Prefix of master weights: a checkpoint holds the parameter ``name`` as ``weight.<name>``."""

PARAMETER_PREFIXES = (WEIGHT, "exp_avg.", "exp_avg_sq.")
"""Prefixes of everything that a checkpoint holds by parameter name: master weights and AdamW's moments."""

OPTIMIZER_STEP = "optimizer.step"
"""The number of AdamW's steps, the only other tensor of a checkpoint."""

TENSOR_SUFFIX = ".distcp"
"""Ending of the files that hold tensors."""

ALLOWED_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""Every global that the pickle of an index may name."""


class CheckpointSource:
    """A TensorSource of a checkpoint's tensors, in the dtypes they were saved in; for one process, without a group.

    It holds the weights by parameter name; with ``optimizer_state`` everything under the stored names: ``weight.``,
    ``exp_avg.`` and ``exp_avg_sq.`` before a parameter name, and ``optimizer.step``.
    """

    def __init__(
        self, path: Path, *, optimizer_state: bool = False, verify: bool = True, version: int = files.FORMAT
    ) -> None:
        """Open a checkpoint, or the newest one of a folder of checkpoints or of a run folder.

        verify   compare every file with the manifest first, which reads all of them
        version  the checkpoint format to read

        Raises CheckpointError when there is none of that format, or when a file is missing or corrupt; ``get`` does
        when the checkpoint was removed meanwhile.
        """
        ignore_single_process_warning()
        self.path = files.find_checkpoint(path)
        self._manifest = files.read_manifest(self.path, version=version)
        files.verify(self.path, sorted(self._manifest) if verify else (), self._manifest)
        self._reader = RestrictedIndexReader(self.path)
        self._prefix = "" if optimizer_state else WEIGHT
        self.specs: Mapping[str, TensorSpec] = {
            name.removeprefix(self._prefix): TensorSpec(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if name.startswith(self._prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def get(self, name: str) -> Tensor:
        others = ((other, self._read(other)) for other in self.specs if other != name)
        return require_finite(self._read(name), name, self.path, others)

    def _read(self, name: str) -> Tensor:
        spec = self.specs[name]
        state = {self._prefix + name: torch.empty(spec.shape, dtype=spec.dtype)}
        try:
            dcp.load(state, storage_reader=self._reader, no_dist=True)
        except (OSError, dcp.api.CheckpointException) as error:
            if (self.path / files.MANIFEST).exists():
                raise
            raise CheckpointError(
                f"{self.path} was removed while it was read. A run that still trains keeps its newest checkpoints only "
                "(checkpoint.keep_last): wait for its end, or name one that it keeps (checkpoint.keep_every)."
            ) from error
        return state[self._prefix + name]

    def other_files(self) -> dict[str, Path]:
        """The checkpoint's files by name, but for the tensors, their index, the configuration and the manifest."""
        return {
            name: self.path / name
            for name in self._manifest
            if name not in (files.INDEX, files.CONFIG) and not name.endswith(TENSOR_SUFFIX)
        }


def stored_weights(weights: TensorSource) -> LazyTensors:
    """Weights by parameter name, under the names that ``write_checkpoint`` takes."""
    return to_native(weights, {WEIGHT + name: (name,) for name in weights.specs})


def write_checkpoint(
    folder: Path,
    step: int,
    source: TensorSource,
    *,
    config_yaml: str,
    attach: Mapping[str, bytes | Path] | None = None,
    num_files: int = 1,
) -> Path:
    """Write ``folder``/step_000000 (for ``step`` 0) from a source, one tensor in memory at a time; return its path.

    For one process. It is published, and ``latest`` updated, once it is complete.

    source     tensors under stored names: ``weight.<parameter>`` (see ``stored_weights``), and optimizer state
    attach     further files by name: their bytes, or a file or folder to copy; EXTRA replaces the default one
    num_files  how many files of about equal size the tensors are distributed over, in the source's order

    Raises CheckpointError when something cannot be written (full disk) or does not read back as it was written.
    """
    assert all(name.startswith((*PARAMETER_PREFIXES, OPTIMIZER_STEP)) for name in source.specs), "use stored names"
    shapes = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in source.specs.items()}
    ignore_single_process_warning()
    staging = files.create_staging_dir(folder, step)
    writer = VerifyingWriter(staging, num_files=num_files)
    try:
        dcp.save(shapes, storage_writer=writer, planner=_SourcePlanner(source), no_dist=True)
        files.write_text(staging / files.CONFIG, config_yaml)
        attached: dict[str, bytes | Path] = dict(attach or {})
        if files.EXTRA not in attached:
            files.write_json(staging / files.EXTRA, {"extra": {"step": step}, "rng_states": []})
        for name, content in attached.items():
            attach_file(staging / name, content)
        return files.finalize(staging, step, writer.written)
    except (OSError, CheckpointError, dcp.api.CheckpointException) as error:
        raise write_error(staging, error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class RestrictedIndexReader(dcp.FileSystemReader):
    """DCP's reader, with an index that is read once, by an unpickler that knows only the classes of an index."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint. Raises CheckpointError when its pickle names anything else."""
        if self._index is None:
            with (Path(self.path) / files.INDEX).open("rb") as file:
                self._index = _IndexUnpickler(file).load()
            assert self._index is not None
            if self._index.storage_meta is None:
                self._index.storage_meta = StorageMeta()
        assert self._index.storage_meta is not None
        self._index.storage_meta.load_id = self.load_id
        return self._index


class VerifyingWriter(dcp.FileSystemWriter):
    """DCP's writer, with files that are hashed while they are written, forced to disk and read back.

    It also resolves one tensor at a time; torch's own keeps all tensors of a file until the file is complete.
    ``written`` holds this rank's manifest entries.
    """

    def __init__(self, path: Path, *, num_files: int = 1) -> None:
        super().__init__(path)
        self.folder = path
        self.num_files = num_files
        self.written: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's items; see torch's StorageWriter.write_data.

        Raises OSError (full disk), or CheckpointError when a file does not read back as it was written.
        """
        results = []
        for number, items in enumerate(_distribute(plan.items, self.num_files)):
            name = f"{plan.storage_data.prefix}{number}{TENSOR_SUFFIX}"
            results += self._write_file(name, items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        with (self.folder / name).open("wb") as file:
            stream = HashingWriter(file)
            for item in items:
                start = stream.num_bytes
                stream.save(_compact(planner.resolve_data(item)))
                length = stream.num_bytes - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
            file.flush()
            os.fsync(file.fileno())
            # drop the page cache, so that the file is read back from the disk where the operating system complies
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        entry = stream.digest()
        if files.file_digest(self.folder / name) != entry:
            raise CheckpointError(f"{self.folder / name} is not read back as it was written: is the disk failing?")
        self.written[name] = entry
        return results


class HashingWriter:
    """A binary file that counts and hashes what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None
        self._sha256 = hashlib.sha256()
        self.num_bytes = 0

    def save(self, tensor: Tensor) -> None:
        """torch.save. Re-raise the underlying OSError, which torch hides in a RuntimeError."""
        try:
            torch.save(tensor, self)  # type: ignore[arg-type]
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: bytes | memoryview) -> int:
        """Write to the file."""
        self._sha256.update(data)
        self.num_bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()

    def digest(self) -> dict[str, Any]:
        """The manifest entry of what was written, as ``files.file_digest`` computes it of the file."""
        return {"bytes": self.num_bytes, "sha256": self._sha256.hexdigest()}


class _SourcePlanner(dcp.DefaultSavePlanner):
    """Plans by shapes alone, and asks a source for each tensor when it is written."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__()
        self._source = source

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name = write_item.index.fqn
        tensor, spec = self._source.get(name), self._source.specs[name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype), name
        return tensor


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in ALLOWED_GLOBALS.get(module, ()):
            raise CheckpointError(
                f"The checkpoint's {files.INDEX} asks for {module}.{name}, which no index needs: do not trust it."
            )
        return super().find_class(module, name)


def ignore_single_process_warning() -> None:
    """Silence torch's warning that it runs without a process group."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def write_error(staging: Path, error: BaseException) -> Exception:
    """The error to raise for one met while writing: CheckpointError for a full disk and the like, else RuntimeError.

    What is wrong with weights that were to be read is returned as it is.

    DCP wraps the errors of all ranks; the first one is taken.
    """
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    if isinstance(first, BaseWeightsError):
        return first
    if isinstance(first, OSError | CheckpointError):
        return CheckpointError(f"{staging} cannot be written: {first}. Earlier checkpoints are intact.")
    return RuntimeError(str(error))


def _distribute(items: list[WriteItem], num_files: int) -> list[list[WriteItem]]:
    """Items in order, distributed over files of about equal size; some stay empty where there are few items."""
    sizes = [item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize for item in items]  # type: ignore[union-attr]
    groups: list[list[WriteItem]] = [[] for _ in range(num_files)]
    before, total = 0, max(sum(sizes), 1)
    for item, size in zip(items, sizes, strict=True):
        groups[(before * num_files) // total if before < total else -1].append(item)
        before += size
    return groups


def _compact(tensor: Any) -> Tensor:
    """The tensor on the CPU, in a storage of its own size: torch.save writes the whole storage of a view."""
    assert isinstance(tensor, Tensor), "nothing else is saved by name"
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def attach_file(path: Path, content: bytes | Path) -> None:
    """Write bytes to ``path``, or copy a file or a folder there, and force it to disk."""
    if isinstance(content, Path) and content.is_dir():
        for file in sorted(content.iterdir()):
            attach_file(path / file.name, file)
        files.sync_dir(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as copy:
        if isinstance(content, bytes):
            copy.write(content)
        else:
            with content.open("rb") as original:
                shutil.copyfileobj(original, copy)
        copy.flush()
        os.fsync(copy.fileno())
