"""Decide when to save a checkpoint, and what to do when that fails."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console
from rich.markup import escape

from aki_megatron.checkpoint.checkpointer import Checkpointer, SavedCheckpoint
from aki_megatron.errors import CheckpointError
from aki_megatron.supervise.events import EventRecorder, ignore_event
from aki_megatron.supervise.progress import SAVING
from aki_megatron.train.loop import Callback
from aki_megatron.types import ControlRequest, StepReport

logger = logging.getLogger("aki_megatron.train")


class CheckpointCallback(Callback):
    """Save a checkpoint every ``interval`` steps, on request, and after the last step; on every rank, collectively.

    A checkpoint that cannot be written (full disk) is reported and training continues; only the last one, of the run
    or before a stop, must succeed.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        save: Callable[[int], None],
        interval: int,
        steps: int,
        console: Console | None,
        *,
        save_at_start: bool = False,
        set_phase: Callable[[str], None] = lambda phase: None,
        record_event: EventRecorder = ignore_event,
    ) -> None:
        """Create the callback.

        save           hands the state after a step to ``checkpointer``
        interval       steps between checkpoints
        steps          of the whole run
        save_at_start  save a new run before its first step, too
        set_phase      told when this rank begins to save, or to wait for the save before
        record_event   told of checkpoints that could not be written
        """
        self.checkpointer = checkpointer
        self.save = save
        self.interval = interval
        self.steps = steps
        self.console = console
        self.save_at_start = save_at_start
        self.set_phase = set_phase
        self.record_event = record_event
        self.last_step = 0
        """Step of the last save that was begun."""
        self.pause_seconds = 0.0
        """Time that training waited for it."""

    def on_start(self, step: int) -> None:
        if self.save_at_start and step == 0:
            self._report_failure_of(lambda: self._begin(0))

    def on_step(self, step: int, report: StepReport) -> None:
        if step == self.steps or ControlRequest.STOP in report.control:
            self._save_now(step)
        elif ControlRequest.SAVE in report.control:
            self._report_failure_of(lambda: self._save_now(step))
        elif step % self.interval == 0:
            self._report_failure_of(lambda: self._begin(step))
        self._report_failure_of(self.checkpointer.poll)

    def _save_now(self, step: int) -> None:
        """Save a checkpoint that is complete on return. Raises CheckpointError on every rank."""
        self._begin(step)
        self._report_saved(self.checkpointer.wait())

    def _begin(self, step: int) -> None:
        started = time.monotonic()
        self.set_phase(SAVING)
        self._report_failure_of(self.checkpointer.wait)  # this save is made even where the one before failed
        self.last_step = step
        self.save(step)
        self.pause_seconds = time.monotonic() - started

    def _report_failure_of(self, action: Callable[[], SavedCheckpoint | None]) -> None:
        """Run an action; report a CheckpointError instead of raising it."""
        try:
            self._report_saved(action())
        except CheckpointError as error:
            logger.error("no checkpoint at step %d: %s", self.last_step, error)
            with suppress(OSError):  # the disk may be full for this line, too
                self.record_event(self.last_step, "save_failed", str(error))
            if self.console:
                text = f"[bold red]no checkpoint at step {self.last_step}, training continues:[/] {escape(str(error))}"
                self.console.print(text)

    def _report_saved(self, saved: SavedCheckpoint | None) -> None:
        if saved is None:
            return
        pause = f"training paused {self.pause_seconds:.2f} s"
        line = f"saved step {saved.step}: {pause}, complete after {saved.seconds:.2f} s"
        logger.info(line)
        if self.console:
            self.console.print(line)
