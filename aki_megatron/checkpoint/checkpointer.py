"""Training state at rest: logical tensors by torch.distributed.checkpoint, facts as JSON, a sha256 for every file.

A checkpoint is written under a name that nobody reads, forced to disk, read back, renamed, and only then pointed to by
``latest``: a kill at any moment leaves the previous one whole.

Each rank brings the tensors it has a part in: pipeline ranks have other names, and a tensor that two stages share (a
tied table) is written once. A checkpoint holds nothing of how the run was spread.
"""

import json
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.dcp_io import CheckedWriter, CheckpointSource, IndexedReader, expect_one_process, failure
from aki_megatron.errors import CheckpointError


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    step: int
    path: Path
    seconds: float
    """From the state in hand to ``latest`` moved; of them training waited for all or, asynchronously, for none."""


class Checkpointer:
    """Checkpoints of one run: ``folder``/step_000100 and so on. ``save`` and ``load`` are collective.

    At most one save is under way. Asynchronously ``save`` returns when the state lies in the host's memory, and a
    thread writes it; what becomes of that, ``poll`` and ``wait`` tell.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_every: int = 0,
        config_yaml: str = "",
        async_save: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        """
        keep_last, keep_every  see CheckpointConfig
        config_yaml            the resolved configuration; it goes into every checkpoint
        group                  all ranks, for this saver's collectives; asynchronously nothing else may use it, or the
                               thread's would mix with training's. None: the world
        """
        expect_one_process()
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.config_yaml = config_yaml
        self._ranks = _Ranks(group)
        assert group is not None or not async_save or self._ranks.size == 1, "the thread needs a group of its own"
        # threads of an executor are waited for when the process ends
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver") if async_save else None
        self._under_way: Future[Saved] | None = None

    def save(self, step: int, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
        """Write a checkpoint and drop old ones, or begin to.

        tensors  what this rank has a part in: DTensors over the ranks with the same names, written by their owners.
                 What several ranks bring under one name and place is the same and written once. Asynchronously they
                 are the saver's: tensors in the host's memory are not copied and must not change any more.
        extra    facts that JSON can hold; those of rank 0 are kept

        Errors: CheckpointError on every rank when any rank cannot write (full disk); earlier checkpoints stay. It is
        raised here, or by the first ``poll``, ``wait`` or ``save`` after the thread met it.
        """
        self.wait()
        facts = json.dumps(dict(extra)), _random_state()
        if self._thread is None:
            saved = self._write(step, tensors, *facts)
            self._under_way = Future()
            self._under_way.set_result(saved)
            return
        held = {name: tensor if tensor.device.type == "cpu" else tensor.to("cpu") for name, tensor in tensors.items()}
        self._under_way = self._thread.submit(self._write, step, held, *facts)

    def poll(self) -> Saved | None:
        """The save that was completed since ``save``; None while it goes on, and when it was told already.

        Ranks may learn of it at different times. Errors: see ``save``.
        """
        return self.wait() if self._under_way is not None and self._under_way.done() else None

    def wait(self) -> Saved | None:
        """``poll`` once no save is under way any more: what was saved is complete. Errors: see ``save``."""
        under_way, self._under_way = self._under_way, None
        return under_way.result() if under_way is not None else None

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return files.newest(self.folder)

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill ``tensors`` in place from the checkpoint at ``path``, whatever layout wrote it; returns ``extra``.

        Each rank asks for what it has a part in; together the ranks must ask for everything. The random generators of
        this rank are restored when the number of ranks is the one that saved. A save that is under way ends first.

        Errors: CheckpointError on every rank when a file is missing or corrupt (it names the file and the checkpoint to
        go back to), or when names or shapes are those of another model; and see ``save``.
        """
        self.wait()
        ranks = self._ranks
        _verify(path, ranks)
        reader = IndexedReader(path)
        shares = ranks.gather({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        wanted = {name: shape for share in shares for name, shape in share.items()}
        ranks.agree(lambda: _refuse_other_model(path, reader.read_metadata(), wanted))
        dcp.load(dict(tensors), storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
        facts = json.loads((path / files.EXTRA).read_text())
        if len(facts["random"]) == ranks.size:
            _restore_random_state(facts["random"][ranks.rank])
        return facts["extra"]

    def _write(self, step: int, tensors: Mapping[str, Tensor], extra: str, random_state: Mapping[str, Any]) -> Saved:
        """All of a save but the state itself, in whichever thread; collective."""
        started, ranks = time.monotonic(), self._ranks
        aside = self.folder / f"{files.WRITING}{files.folder_name(step)}"
        try:
            ranks.on_first(lambda: files.begin(self.folder, step))
            writer = CheckedWriter(aside)
            dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)
            shares = ranks.gather((writer.written, random_state))
            ranks.on_first(lambda: self._finish(aside, step, extra, shares))
        except (CheckpointError, dcp.api.CheckpointException) as error:
            if ranks.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)  # it takes room that the next one needs
            raise failure(aside, error) from None
        return Saved(step, self.folder / files.folder_name(step), time.monotonic() - started)

    def _finish(self, aside: Path, step: int, extra: str, shares: list[tuple[dict[str, Any], Any]]) -> None:
        facts = {"extra": json.loads(extra), "random": [state for _, state in shares]}
        files.write_json(aside / files.EXTRA, facts)
        files.write_text(aside / files.CONFIG, self.config_yaml)
        files.complete(aside, step, {name: entry for written, _ in shares for name, entry in written.items()})
        files.prune(self.folder, keep_last=self.keep_last, keep_every=self.keep_every)


class SavedWeights:
    """Master weights of a checkpoint by parameter name, read one at a time; opened by all ranks of the world together.

    ``path`` is a checkpoint, a folder of checkpoints, or a run folder (its newest checkpoint is taken).

    Errors: CheckpointError on every rank when there is no whole checkpoint.
    """

    def __init__(self, path: Path) -> None:
        world = _Ranks(None)
        self.path: Path = world.agree(lambda: files.find(path))
        _verify(self.path, world)
        self._source: CheckpointSource = world.agree(lambda: CheckpointSource(self.path, checked=False))
        self.shapes = {name: fact.shape for name, fact in self._source.facts.items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, whole, float32; each rank by itself."""
        for name in names:
            yield name, self._source.get(name).float()


class _Ranks:
    """All ranks, and what they tell each other; a single one needs no process group."""

    def __init__(self, group: ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1

    def gather(self, mine: Any) -> list[Any]:
        """Every rank's object by rank, on every rank."""
        if self.size == 1:
            return [mine]
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.group)
        return everyone

    def agree(self, action: Callable[[], Any]) -> Any:
        """Result of ``action``; a failure on any rank is raised on all, so that none waits for another."""
        result, failure = None, None
        try:
            result = action()
        except (CheckpointError, OSError, pickle.UnpicklingError) as error:
            failure = str(error)
        failures = [text for text in self.gather(failure) if text is not None]
        if failures:
            raise CheckpointError(failures[0])
        return result

    def on_first(self, action: Callable[[], object]) -> None:
        """``action`` on rank 0; all wait for it and fail with it."""
        self.agree(action if self.rank == 0 else lambda: None)


def _verify(path: Path, ranks: _Ranks) -> None:
    """Compare every file of a checkpoint with its manifest: each is read by one rank, together they read all."""
    listed = ranks.agree(lambda: files.read_manifest(path))
    ranks.agree(lambda: files.verify(path, sorted(listed)[ranks.rank :: ranks.size], listed))


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


def _random_state() -> dict[str, Any]:
    """Python's, numpy's and torch's generators, as JSON holds them."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))
