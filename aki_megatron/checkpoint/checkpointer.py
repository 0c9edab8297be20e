"""Training checkpoints: the global state by torch.distributed.checkpoint, other state as JSON, a sha256 of every file.

A checkpoint is written to a staging folder, forced to disk, read back, renamed, and only then named by ``latest``: a
kill at any moment leaves the previous one intact.

The global state holds tensors by names and shapes that do not depend on the parallel layout. Each rank passes those it
holds a part of: pipeline ranks have different names, and a tensor that two stages hold (tied embeddings) is written
once.
"""

import json
import random
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.collectives import RankGroup
from aki_megatron.checkpoint.dcp_io import (
    RestrictedIndexReader,
    VerifyingWriter,
    attach_file,
    ignore_single_process_warning,
    write_error,
)
from aki_megatron.checkpoint.shapes import check_shapes
from aki_megatron.errors import CheckpointError

RESUME_HINT = "Use the model section of that run's config.yaml, or start in another run.dir."


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that is complete."""

    step: int
    path: Path
    seconds: float
    """From the state in host memory to ``latest`` updated. Training waits for it only if saving is synchronous."""


@dataclass(frozen=True)
class _Extras:
    """What a rank saves besides tensors."""

    extra_json: str
    rng_state: Mapping[str, Any]
    rank_files: Mapping[str, str]
    keep_older: bool
    best_step: int | None


class Checkpointer:
    """Checkpoints of one run: ``folder``/step_000100 and so on. ``save`` and ``load`` are collective.

    At most one save is in progress. With ``async_save``, ``save`` returns once the state is in host memory, and a
    thread writes it; ``poll`` and ``wait`` return the outcome.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_every: int = 0,
        config_yaml: str = "",
        tokenizer_files: Mapping[str, bytes] | None = None,
        async_save: bool = False,
        group: ProcessGroup | None = None,
    ) -> None:
        """
        keep_last, keep_every  see CheckpointConfig
        config_yaml            the resolved configuration, which every checkpoint holds
        tokenizer_files        contents by name of the run's tokenizer, which every checkpoint holds too
        group                  all ranks, for this object's collectives. With async_save nothing else may use it, or the
                               thread's collectives would interleave with training's. None: the default group
        """
        ignore_single_process_warning()
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.config_yaml = config_yaml
        self._tokenizer_files = dict(tokenizer_files or {})
        self._ranks = RankGroup(group)
        assert group is not None or not async_save or self._ranks.size == 1, "async_save needs a group of its own"
        # the interpreter waits for an executor's threads when it exits
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint") if async_save else None
        self._in_progress: Future[SavedCheckpoint] | None = None
        self._step_in_progress = -1

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        extra: Mapping[str, Any],
        *,
        rank_files: Mapping[str, str] | None = None,
        keep_older: bool = False,
        best_step: int | None = None,
    ) -> None:
        """Write a checkpoint and remove old ones, or with async_save start to.

        tensors     this rank's part of the global state: DTensors over the ranks with the same names, written by their
                    owners. What several ranks hold under one name is the same and is written once. With async_save
                    they belong to the checkpointer: tensors in host memory are not copied and must not change any more.
        extra       further state that JSON can hold; rank 0's is kept
        rank_files  texts of this rank by the path of their file inside the checkpoint; no two ranks name one path
        keep_older  remove no old checkpoint: this one may be worse
        best_step   step of the checkpoint, this one or an earlier one, that ``best`` names from now on, so that it is
                    not removed; None: ``best`` stays as it is

        Raises CheckpointError on every rank when any rank cannot write (full disk), or holds values that are not
        finite; earlier checkpoints stay. With async_save the next ``poll``, ``wait``, ``save`` or ``load`` raises it.
        """
        self.wait()
        extras = _Extras(json.dumps(dict(extra)), _get_rng_state(), dict(rank_files or {}), keep_older, best_step)
        self._step_in_progress = step
        if self._executor is None:
            saved = self._write(step, tensors, extras)
            self._in_progress = Future()
            self._in_progress.set_result(saved)
            return
        on_host = {
            name: tensor if tensor.device.type == "cpu" else tensor.to("cpu") for name, tensor in tensors.items()
        }
        self._in_progress = self._executor.submit(self._write, step, on_host, extras)

    def poll(self) -> SavedCheckpoint | None:
        """The save that was completed since the last call; None while it is in progress, and once it was returned.

        Ranks may see it complete at different times. Raises as ``save`` does.
        """
        return self.wait() if self._in_progress is not None and self._in_progress.done() else None

    def wait(self) -> SavedCheckpoint | None:
        """Wait until no save is in progress, then do as ``poll`` does."""
        in_progress, self._in_progress = self._in_progress, None
        return in_progress.result() if in_progress is not None else None

    def has_checkpoint(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is complete, or being written."""
        if self._in_progress is not None and not self._in_progress.done() and self._step_in_progress == step:
            return True
        return (self.folder / files.checkpoint_name(step) / files.MANIFEST).is_file()

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return files.latest_checkpoint(self.folder)

    def load(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fill ``tensors`` in place from the checkpoint at ``path``, whatever layout wrote it; return ``extra``.

        Each rank passes the part of the global state that it holds; together the ranks pass all of it. The random
        generators of this rank are restored if the number of ranks is the one that saved. A save in progress is waited
        for first.

        Raises CheckpointError on every rank when a file is missing or corrupt (it names the file and the checkpoint to
        fall back to), when the format is an earlier one (it names the command that converts it), or when names or
        shapes are those of another model; and as ``save`` does.
        """
        self.wait()
        ranks = self._ranks
        ranks.verify_checkpoint(path)
        reader = RestrictedIndexReader(path)
        shapes_by_rank = ranks.gather({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        expected = {name: shape for shapes in shapes_by_rank for name, shape in shapes.items()}
        ranks.run_on_all(lambda: check_shapes(_stored_shapes(reader), expected, str(path), RESUME_HINT))
        dcp.load(dict(tensors), storage_reader=reader, process_group=ranks.group, no_dist=ranks.size == 1)
        content = json.loads((path / files.EXTRA).read_text())
        if len(content["rng_states"]) == ranks.size:
            _set_rng_state(content["rng_states"][ranks.rank])
        return content["extra"]

    def _write(self, step: int, tensors: Mapping[str, Tensor], extras: "_Extras") -> SavedCheckpoint:
        """Write, verify and publish a checkpoint; collective, in the caller's thread or the executor's."""
        started, ranks = time.monotonic(), self._ranks
        name = files.checkpoint_name(step)
        staging = self.folder / f"{files.WRITING}{name}"
        ranks.run_on_all(lambda: _check_finite(tensors, step))
        try:
            ranks.run_on_rank_zero(lambda: files.create_staging_dir(self.folder, step))
            ranks.run_on_all(lambda: _write_rank_files(staging, extras.rank_files))
            writer = VerifyingWriter(staging)
            dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.group, no_dist=ranks.size == 1)
            by_rank = ranks.gather((writer.written, extras.rng_state))
            written = {file: entry for entries, _ in by_rank for file, entry in entries.items()}
            content = {"extra": json.loads(extras.extra_json), "rng_states": [state for _, state in by_rank]}
            ranks.run_on_rank_zero(lambda: self._publish(staging, step, written, content, extras))
        except (CheckpointError, dcp.api.CheckpointException) as error:
            if ranks.rank == 0:
                shutil.rmtree(staging, ignore_errors=True)  # the next save needs its disk space
            raise write_error(staging, error) from None
        return SavedCheckpoint(step, self.folder / name, time.monotonic() - started)

    def _publish(
        self, staging: Path, step: int, written: Mapping[str, Any], content: Mapping[str, Any], extras: "_Extras"
    ) -> None:
        files.write_json(staging / files.EXTRA, content)
        files.write_text(staging / files.CONFIG, self.config_yaml)
        for name, stored in self._tokenizer_files.items():
            attach_file(staging / files.TOKENIZER / name, stored)
        files.finalize(staging, step, written)
        best = extras.best_step
        if best is not None and (self.folder / files.checkpoint_name(best) / files.MANIFEST).is_file():
            files.name_best(self.folder, best)
        if not extras.keep_older:
            files.prune(self.folder, keep_last=self.keep_last, keep_every=self.keep_every)


def _check_finite(tensors: Mapping[str, Tensor], step: int) -> None:
    """Raise CheckpointError for a state that no run should resume from."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # the extremes are NaN where any element is; 20 times faster than isfinite().all() on a CPU, and without a copy
        if local.is_floating_point() and local.numel() and not torch.stack(torch.aminmax(local)).isfinite().all():
            raise CheckpointError(
                f"the state after step {step} is not finite ({name}), so it is not saved: it would displace a good "
                "one. Lower optimizer.lr and resume from the last checkpoint."
            )


def _write_rank_files(staging: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        files.write_text(staging / name, text)


def _stored_shapes(reader: RestrictedIndexReader) -> dict[str, tuple[int, ...]]:
    entries = reader.read_metadata().state_dict_metadata
    return {name: tuple(getattr(entry, "size", ())) for name, entry in entries.items()}


def _get_rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's random generators, in a form that JSON can hold."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["torch"]), dtype=torch.uint8))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))
