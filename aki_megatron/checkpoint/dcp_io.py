"""A checkpoint's tensors on disk, read and written one at a time, in the format of torch.distributed.checkpoint.

What is written is hashed on its way out and read back from the disk before it counts. What is read is checked against
the manifest, and nothing is unpickled but tensors (``weights_only``) and torch's own index, whose unpickler knows only
the names of that index.
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

from aki_megatron.checkpoint.files import (
    CONFIG,
    EXTRA,
    INDEX,
    begin,
    complete,
    digest,
    find,
    read_manifest,
    sync_folder,
    verify,
    write_json,
    write_text,
)
from aki_megatron.checkpoint.tensors import TensorFact, TensorSource, View
from aki_megatron.errors import CheckpointError

WEIGHT = "weight."
"""Master weights are the logical tensors ``weight.<parameter>``."""

INDEX_NAMES = {
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
"""Everything an index may name."""


class CheckpointSource:
    """The tensors of a checkpoint in the dtypes that were saved; for one process, without a process group.

    Named as parameters are, weights only; with ``moments`` as they are stored: ``weight.``, ``exp_avg.``,
    ``exp_avg_sq.`` and ``optimizer.step``. See TensorSource.
    """

    def __init__(self, path: Path, moments: bool = False, *, checked: bool = True) -> None:
        """Open a checkpoint, or the newest one of a folder of checkpoints or of a run folder.

        checked  whether to compare every file with the manifest first, which reads all of them

        Errors: CheckpointError when there is none, or when a file is missing or corrupt.
        """
        expect_one_process()
        self.path = find(path)
        listed = read_manifest(self.path)
        verify(self.path, sorted(listed) if checked else (), listed)
        self._reader = IndexedReader(self.path)
        self._prefix = "" if moments else WEIGHT
        self.facts: Mapping[str, TensorFact] = {
            name.removeprefix(self._prefix): TensorFact(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._reader.read_metadata().state_dict_metadata.items()
            if name.startswith(self._prefix) and isinstance(entry, TensorStorageMetadata)
        }

    def get(self, name: str) -> Tensor:
        """See TensorSource.get."""
        fact = self.facts[name]
        whole = {self._prefix + name: torch.empty(fact.shape, dtype=fact.dtype)}
        dcp.load(whole, storage_reader=self._reader, no_dist=True)
        return whole[self._prefix + name]


def as_stored(weights: TensorSource) -> View:
    """Weights by parameter name under the names that ``write_checkpoint`` takes."""
    return View(
        {WEIGHT + name: fact for name, fact in weights.facts.items()},
        {WEIGHT + name: lambda name=name: weights.get(name) for name in weights.facts},  # type: ignore[misc]
    )


def write_checkpoint(
    folder: Path,
    step: int,
    source: TensorSource,
    *,
    config_yaml: str,
    attach: Mapping[str, bytes | Path] | None = None,
    files: int = 1,
) -> Path:
    """Write ``folder``/step_000000 (or whatever ``step`` is) from a source, one tensor in memory at a time.

    For one process. ``latest`` points to it in the end; nothing can be taken for a checkpoint before.

    source  names as they are stored: ``weight.<parameter>`` (see ``as_stored``), and the moments where there are some
    attach  further files by name: their bytes, or a file or folder to copy; EXTRA carries over what a run saved
    files   how many files the tensors are dealt into, in the source's order, about equally

    Errors: CheckpointError when something cannot be written (full disk) or is not read back as it was written.
    """
    assert all(name.startswith((WEIGHT, "exp_avg", "optimizer.")) for name in source.facts), "see as_stored"
    shapes = {name: torch.empty(fact.shape, dtype=fact.dtype, device="meta") for name, fact in source.facts.items()}
    expect_one_process()
    aside = begin(folder, step)
    writer = CheckedWriter(aside, files=files)
    try:
        dcp.save(shapes, storage_writer=writer, planner=_SourcePlanner(source), no_dist=True)
        write_text(aside / CONFIG, config_yaml)
        attached: dict[str, bytes | Path] = dict(attach or {})
        if EXTRA not in attached:
            write_json(aside / EXTRA, {"extra": {"step": step}, "random": []})
        for name, content in attached.items():
            _attach(aside / name, content)
        return complete(aside, step, writer.written)
    except (OSError, CheckpointError, dcp.api.CheckpointException) as error:
        raise failure(aside, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class IndexedReader(dcp.FileSystemReader):
    """Reads torch's index once, with an unpickler that knows only the names an index is made of."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint.

        Errors: CheckpointError when it names anything else.
        """
        if self._index is None:
            with (Path(self.path) / INDEX).open("rb") as file:
                self._index = _IndexUnpickler(file).load()
            assert self._index is not None
            if self._index.storage_meta is None:
                self._index.storage_meta = StorageMeta()
        assert self._index.storage_meta is not None
        self._index.storage_meta.load_id = self.load_id
        return self._index


class CheckedWriter(dcp.FileSystemWriter):
    """Writes a rank's tensors one at a time and knows the sha256 of what it wrote, which is read back from the disk.

    (torch's own keeps every tensor of a file until the file is done.) ``written`` holds the manifest entries.
    """

    def __init__(self, path: Path, *, files: int = 1) -> None:
        super().__init__(path)
        self.folder = path
        self.files = files
        self.written: dict[str, dict[str, Any]] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """See StorageWriter.write_data.

        Errors: OSError (full disk), CheckpointError when a file is not read back as it was written.
        """
        results = []
        for number, items in enumerate(_dealt(plan.items, self.files)):
            name = f"{plan.storage_data.prefix}{number}.distcp"
            results += self._write_file(name, items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write_file(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        results = []
        with (self.folder / name).open("wb") as file:
            stream = HashedStream(file)
            for item in items:
                first = stream.bytes
                stream.save(_compact(planner.resolve_data(item)))
                length = stream.bytes - first
                results.append(WriteResult(item.index, length, _StorageInfo(name, first, length)))
            file.flush()
            os.fsync(file.fileno())
            # so that it is read from the disk, where the operating system heeds it
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        entry = {"bytes": stream.bytes, "sha256": stream.sha256.hexdigest()}
        if digest(self.folder / name) != entry:
            raise CheckpointError(f"{self.folder / name} is not read back as it was written: is the disk failing?")
        self.written[name] = entry
        return results


class HashedStream:
    """A file that torch.save can write to, which counts and hashes what it gets."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._error: OSError | None = None
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def save(self, tensor: Tensor) -> None:
        """torch.save; but it makes of a full disk an error of its own that says nothing of it."""
        try:
            torch.save(tensor, self)  # type: ignore[arg-type]
        except RuntimeError:
            if self._error is not None:
                raise self._error from None
            raise

    def write(self, data: bytes | memoryview) -> int:
        """Write to the file."""
        self.sha256.update(data)
        self.bytes += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()


class _SourcePlanner(dcp.DefaultSavePlanner):
    """Plans by shapes alone and asks a source for each tensor when it is written."""

    def __init__(self, source: TensorSource) -> None:
        super().__init__()
        self._source = source

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        name = write_item.index.fqn
        tensor, fact = self._source.get(name), self._source.facts[name]
        assert (tuple(tensor.shape), tensor.dtype) == (fact.shape, fact.dtype), name
        return tensor


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX_NAMES.get(module, ()):
            raise CheckpointError(
                f"The checkpoint's {INDEX} asks for {module}.{name}, which no index needs: do not trust it."
            )
        return super().find_class(module, name)


def expect_one_process() -> None:
    """Silence torch's warning that it works in one process where that is what was asked."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def failure(aside: Path, error: BaseException) -> Exception:
    """What an error in writing ``aside`` is: CheckpointError for a full disk and the like, else a fault of ours.

    DCP wraps the errors of all ranks.
    """
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    if isinstance(first, OSError | CheckpointError):
        return CheckpointError(f"{aside} cannot be written: {first}. Earlier checkpoints are whole.")
    return RuntimeError(str(error))


def _dealt(items: list[WriteItem], files: int) -> list[list[WriteItem]]:
    """Items in order, cut into as many runs of about equal size; a run may be empty where there are few items."""
    sizes = [item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize for item in items]  # type: ignore[union-attr]
    runs: list[list[WriteItem]] = [[] for _ in range(files)]
    before, total = 0, max(sum(sizes), 1)
    for item, size in zip(items, sizes, strict=True):
        runs[(before * files) // total if before < total else -1].append(item)
        before += size
    return runs


def _compact(tensor: Any) -> Tensor:
    """On the CPU, without the rest of the storage that it may be a part of, which torch.save would write too."""
    assert isinstance(tensor, Tensor), "nothing else is saved by name"
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _attach(path: Path, content: bytes | Path) -> None:
    """Write bytes to ``path``, or copy a file or a folder there, and force it to disk."""
    if isinstance(content, Path) and content.is_dir():
        for file in sorted(content.iterdir()):
            _attach(path / file.name, file)
        sync_folder(path)
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
