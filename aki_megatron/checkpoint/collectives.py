"""What ranks do together around a checkpoint: gather objects, fail on all ranks, verify the files of a checkpoint."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from aki_megatron.checkpoint import files
from aki_megatron.errors import CheckpointError

T = TypeVar("T")


class RankGroup:
    """All ranks of the world; a single process needs no process group."""

    def __init__(self, group: ProcessGroup | None = None) -> None:
        """``group`` holds all ranks and carries the communication; None is the default group."""
        self.group = group
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.size = dist.get_world_size() if dist.is_initialized() else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value by rank, on every rank; collective."""
        if self.size == 1:
            return [value]
        values: list[T] = [value] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run ``action`` on every rank and return this rank's result; collective.

        Raises CheckpointError on every rank with the message of the first rank that failed, so that none waits for it.
        """
        result, error = None, None
        try:
            result = action()
        except (CheckpointError, OSError, pickle.UnpicklingError) as caught:
            error = str(caught)
        errors = [text for text in self.gather(error) if text is not None]
        if errors:
            raise CheckpointError(errors[0])
        return result  # type: ignore[return-value]

    def run_on_rank_zero(self, action: Callable[[], object]) -> None:
        """Run ``action`` on rank 0 only; every rank waits for it and fails with it; collective."""
        self.run_on_all(action if self.rank == 0 else lambda: None)

    def verify_checkpoint(self, path: Path) -> None:
        """Compare every file of a checkpoint with its manifest, each file read by one rank; collective.

        Raises CheckpointError on every rank where a file is missing or corrupt.
        """
        listed = self.run_on_all(lambda: files.read_manifest(path))
        self.run_on_all(lambda: files.verify(path, sorted(listed)[self.rank :: self.size], listed))
