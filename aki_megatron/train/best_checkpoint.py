"""Which validated step has the lowest loss of those whose checkpoint is kept: what ``checkpoints/best`` names."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

logger = logging.getLogger("aki_megatron.train")


@dataclass(frozen=True)
class Validated:
    """A step and its validation loss."""

    step: int
    loss: float


class BestCheckpoint:
    """The best validated step; on rank 0, which tells the others."""

    def __init__(self, has_checkpoint: Callable[[int], bool], name_best: Callable[[int], None]) -> None:
        """
        has_checkpoint  whether the checkpoint of a step is complete, or being written
        name_best       makes ``best`` name the complete checkpoint of a step
        """
        self._has_checkpoint = has_checkpoint
        self._name_best = name_best
        self._best: list[Validated] = []
        """The best step and, in case that its checkpoint cannot be written, the best one before it."""

    @property
    def best(self) -> Validated | None:
        """The best step whose checkpoint is there or being written."""
        return next((found for found in self._best if self._has_checkpoint(found.step)), None)

    def update(self, step: int, loss: float, *, is_saved_next: bool) -> bool:
        """Take note of a validation; return whether it is the best, which its caller then saves.

        is_saved_next  whether the caller can save the step; otherwise it counts only if it has a checkpoint already
        """
        before = self.best
        if not math.isfinite(loss) or (before is not None and loss >= before.loss):
            return False
        if not is_saved_next and not self._has_checkpoint(step):
            return False
        self._best = [Validated(step, loss), *([before] if before else [])]
        if not is_saved_next:
            self._point()
        return True

    def step_after_save(self, step: int) -> int | None:
        """Return the step that ``best`` is to name once the checkpoint of ``step`` is complete; None without one."""
        return next(
            (found.step for found in self._best if found.step == step or self._has_checkpoint(found.step)), None
        )

    def state_dict(self, step: int) -> dict[str, Any] | None:
        """Return the state that the checkpoint of ``step`` holds."""
        kept = [found for found in self._best if found.step == step or self._has_checkpoint(found.step)]
        return asdict(kept[0]) if kept else None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on from the state in a checkpoint, and let ``best`` name what it says."""
        self._best = [Validated(int(state["step"]), float(state["loss"]))] if state else []
        self._point()

    def _point(self) -> None:
        if (best := self.best) is not None:
            try:
                self._name_best(best.step)
            except OSError as error:  # a full disk; the next checkpoint tries again
                logger.error("best cannot name the checkpoint of step %d: %s", best.step, error)
