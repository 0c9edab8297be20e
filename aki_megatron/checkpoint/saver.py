"""Training state at rest: logical tensors by torch.distributed.checkpoint, facts as JSON, a sha256 for every file.

A checkpoint is written under a name that nobody reads, forced to disk, renamed, and only then pointed to by ``latest``:
a kill at any moment leaves the previous one whole. Files are checked before they are read, and nothing is unpickled but
tensors (``weights_only``) and torch's own index, whose unpickler knows only the names of that index.

Each rank brings the tensors it has a part in: pipeline ranks have other names, and a tensor that two stages share (a
tied table) is written once. A checkpoint holds nothing of how the run was spread.
"""

import json
import math
import pickle
import random
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from aki_megatron.checkpoint import files
from aki_megatron.flow import CheckpointError

INDEX, EXTRA = ".metadata", "extra.json"
WEIGHT = "weight."
"""Master weights are the logical tensors ``weight.<parameter>``."""

READ_ELEMENTS = 2**26
"""Weights are read in groups of about this many elements (256 MiB), which bounds what lies in memory beside a model."""

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


class Saver:
    """Checkpoints of one run: ``folder``/step_000100 and so on. Every method but ``latest`` is collective."""

    def __init__(self, folder: Path, *, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> Path:
        """Write a checkpoint and drop old ones.

        tensors  what this rank has a part in: DTensors over the ranks with the same names, written by their owners.
                 What several ranks bring under one name and place is the same and written once.
        extra    facts that JSON can hold; those of rank 0 are kept

        Errors: CheckpointError on every rank when any rank cannot write (full disk); earlier checkpoints stay.
        """
        aside = self.folder / f".writing_{files.folder_name(step)}"
        _on_first_rank(lambda: _fresh(aside))
        try:
            with _quietly():
                dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(aside), no_dist=not dist.is_initialized())
        except (OSError, dcp.api.CheckpointException) as error:
            raise CheckpointError(
                f"{aside} cannot be written: {_cause(error)}. Earlier checkpoints are whole."
            ) from None
        own = _agreed(lambda: {path.name: files.digest(path) for path in aside.glob(f"__{_rank()}_*")})
        shares = _gather((own, _random_state()))

        def finish() -> None:
            listed = {name: entry for share, _ in shares for name, entry in share.items()}
            files.write_json(aside / EXTRA, {"extra": dict(extra), "random": [state for _, state in shares]})
            listed |= {name: files.digest(aside / name) for name in (INDEX, EXTRA)}
            files.write_json(aside / files.MANIFEST, {"step": step, "files": listed})
            files.publish(aside, files.folder_name(step))
            files.keep_newest(self.folder, self.keep_last)

        _on_first_rank(finish)
        return self.folder / files.folder_name(step)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return files.newest(self.folder)

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill ``tensors`` in place from the checkpoint at ``path``, whatever layout wrote it; returns ``extra``.

        Each rank asks for what it has a part in; together the ranks must ask for everything. The random generators of
        this rank are restored when the number of ranks is the one that saved.

        Errors: CheckpointError on every rank when a file is missing or corrupt (it names the file and the checkpoint to
        go back to), or when names or shapes are those of another model.
        """
        _verify(path)
        reader = IndexedReader(path)
        shares = _gather({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        wanted = {name: shape for share in shares for name, shape in share.items()}
        _agreed(lambda: _refuse_other_model(path, reader.read_metadata(), wanted))
        with _quietly():
            dcp.load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())
        facts = json.loads((path / EXTRA).read_text())
        if len(facts["random"]) == _ranks():
            _restore_random_state(facts["random"][_rank()])
        return facts["extra"]


class SavedWeights:
    """Master weights of a checkpoint by parameter name, read in groups; opened by all ranks of the world together.

    ``path`` is a checkpoint, a folder of checkpoints, or a run folder (its newest checkpoint is taken).

    Errors: CheckpointError on every rank when there is no whole checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path: Path = _agreed(lambda: find(path))
        _verify(self.path)
        self._reader = IndexedReader(self.path)
        index = _agreed(self._reader.read_metadata).state_dict_metadata
        self.shapes = {
            name.removeprefix(WEIGHT): tuple(entry.size)
            for name, entry in index.items()
            if name.startswith(WEIGHT) and isinstance(entry, TensorStorageMetadata)
        }

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, whole, float32; each rank by itself, about READ_ELEMENTS elements at a time."""
        for group in self._groups(names):
            tensors = {WEIGHT + name: torch.empty(self.shapes[name], dtype=torch.float32) for name in group}
            with _quietly():
                dcp.load(tensors, storage_reader=self._reader, no_dist=True)
            for name in group:
                yield name, tensors.pop(WEIGHT + name)

    def _groups(self, names: Iterable[str]) -> Iterator[list[str]]:
        group: list[str] = []
        elements = 0
        for name in names:
            group.append(name)
            elements += math.prod(self.shapes[name])
            if elements >= READ_ELEMENTS:
                yield group
                group, elements = [], 0
        if group:
            yield group


def read_weights(path: Path) -> dict[str, Tensor]:
    """All of SavedWeights."""
    saved = SavedWeights(path)
    return dict(saved.read(saved.shapes))


def find(path: Path) -> Path:
    """The checkpoint meant by a checkpoint, a folder of checkpoints, or a run folder.

    Errors: CheckpointError when there is none.
    """
    if (path / files.MANIFEST).is_file() or path.name.startswith(files.PREFIX):
        return path
    for folder in (path / "checkpoints", path):
        if found := files.newest(folder):
            return found
    raise CheckpointError(
        f"No complete checkpoint in {path}: looked for {files.PREFIX}*/{files.MANIFEST} there and in its folder "
        "checkpoints."
    )


class IndexedReader(dcp.FileSystemReader):
    """Reads torch's index with an unpickler that knows only the names an index is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the checkpoint.

        Errors: CheckpointError when it names anything else.
        """
        with (Path(self.path) / INDEX).open("rb") as file:
            metadata = _IndexUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in INDEX_NAMES.get(module, ()):
            raise CheckpointError(
                f"The checkpoint's {INDEX} asks for {module}.{name}, which no index needs: do not trust it."
            )
        return super().find_class(module, name)


def _verify(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest: each is read by one rank, together they read all."""
    listed = _agreed(lambda: files.read_manifest(path))
    _agreed(lambda: files.verify(path, sorted(listed)[_rank() :: _ranks()], listed))


def _refuse_other_model(path: Path, index: Metadata, wanted: Mapping[str, tuple[int, ...]]) -> None:
    saved = {name: tuple(getattr(entry, "size", ())) for name, entry in index.state_dict_metadata.items()}
    if saved == wanted:
        return
    missing, foreign = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    shapes = [
        f"{n} {saved[n]} instead of {wanted[n]}" for n in sorted(saved.keys() & wanted.keys()) if saved[n] != wanted[n]
    ]
    parts = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("not in this model", foreign), ("of another shape", shapes))
        if names
    ]
    raise CheckpointError(
        f"{path} is of another model: {'; '.join(parts)}. Use the model section of that run's config.yaml, or start in "
        "another run.dir."
    )


def _fresh(aside: Path) -> None:
    """An empty folder; what a killed save left behind goes."""
    for stale in aside.parent.glob(".writing_*"):
        shutil.rmtree(stale)
    aside.mkdir(parents=True)


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes().hex(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warning that it works in one process, which is what was asked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _gather(mine: Any) -> list[Any]:
    """Every rank's object by rank, on every rank."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * _ranks()
    dist.all_gather_object(everyone, mine)
    return everyone


def _agreed(action: Callable[[], Any]) -> Any:
    """Result of ``action``; a failure on any rank is raised on all, so that none waits for another."""
    result, failure = None, None
    try:
        result = action()
    except (CheckpointError, OSError, pickle.UnpicklingError) as error:
        failure = str(error)
    failures = [text for text in _gather(failure) if text is not None]
    if failures:
        raise CheckpointError(failures[0])
    return result


def _on_first_rank(action: Callable[[], None]) -> None:
    _agreed(action if _rank() == 0 else lambda: None)


def _cause(error: BaseException) -> str:
    """One line for an error that DCP wraps once per rank."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values())) if failures else error
    return str(first[0] if isinstance(first, tuple) else first).splitlines()[-1]
