"""Decide when to save a checkpoint, and what to do when that fails."""

import logging
import time
from collections.abc import Callable

from aki_megatron.checkpoint.checkpointer import Checkpointer, SavedCheckpoint
from aki_megatron.console import Console, styled
from aki_megatron.errors import CheckpointError
from aki_megatron.supervise.events import EventRecorder, ignore_event
from aki_megatron.supervise.progress import SAVING
from aki_megatron.supervise.validations import ValidationReport
from aki_megatron.train.loop import Callback
from aki_megatron.types import ControlRequest, StepReport

logger = logging.getLogger("aki_megatron.train")


MAX_FAILED_SAVES = 3
"""Saves in a row that may fail; then the run ends, for it would lose all of its work."""


class CheckpointCallback(Callback):
    """Save a checkpoint every ``interval`` steps, of the best validation, on request, and after the last step.

    It exists on every rank, and saves collectively.

    A checkpoint that cannot be written (full disk) is reported and training continues, until MAX_FAILED_SAVES in a row
    have failed; the last one, of the run or before a stop, must succeed.

    While steps are skipped, because their gradients are not finite or a spike, the state may be a bad one, so that it
    must not displace good checkpoints: a checkpoint that is due then is saved after the next step that is not skipped.
    One that cannot wait, before a stop or at the end, removes no older checkpoint.
    """

    required = True

    def __init__(
        self,
        checkpointer: Checkpointer,
        save: Callable[[int, bool], None],
        interval: int,
        steps: int,
        console: Console | None,
        *,
        save_at_start: bool = False,
        set_phase: Callable[[str], None] = lambda phase: None,
        record_event: EventRecorder = ignore_event,
        on_saved: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Create the callback.

        save           hands the state after a step to ``checkpointer``; the second argument: keep older checkpoints
        interval       steps between checkpoints
        steps          of the whole run
        save_at_start  save a new run before its first step, too
        set_phase      told when this rank begins to save, or to wait for the save before
        record_event   told of checkpoints that could not be written
        on_saved       told the step of every checkpoint that is complete
        """
        self.checkpointer = checkpointer
        self.save = save
        self.interval = interval
        self.steps = steps
        self.console = console
        self.save_at_start = save_at_start
        self.set_phase = set_phase
        self.record_event = record_event
        self.on_saved = on_saved
        self.failed_saves = 0
        """Saves that failed in a row."""
        self.last_error = ""
        self.is_due = False
        """A checkpoint was due after a skipped step."""
        self.best_step = -1
        """The last step whose validation was the best."""
        self.last_step = 0
        """Step of the last save that was begun."""
        self.pause_seconds = 0.0
        """Time that training waited for it."""

    def on_start(self, step: int) -> None:
        if self.save_at_start and step == 0:
            self._report_failure_of(lambda: self._begin(0))

    def on_rollback(self, step: int) -> None:
        self.is_due = False

    def on_validation(self, step: int, report: ValidationReport) -> None:
        if report.is_best:
            self.best_step = step

    def on_step_end(self, step: int, report: StepReport) -> None:
        if step == self.steps or ControlRequest.STOP in report.control:
            self._save_now(step, keep_older=report.skipped)
        elif ControlRequest.SAVE in report.control:
            self._report_failure_of(lambda: self._save_now(step, keep_older=report.skipped))
        elif step % self.interval == 0 or self.is_due or step == self.best_step:
            self.is_due = report.skipped
            if self.is_due:
                logger.warning("the checkpoint of step %d waits for a step that is not skipped", step)
            else:
                self._report_failure_of(self.checkpointer.wait)
                self._end_after_failures()
                self._report_failure_of(lambda: self._begin(step))
        self._report_failure_of(self.checkpointer.poll)
        self._end_after_failures()

    def _save_now(self, step: int, *, keep_older: bool) -> None:
        """Save a checkpoint that is complete on return. Raises CheckpointError on every rank."""
        self._begin(step, keep_older=keep_older)
        self._report_saved(self.checkpointer.wait())

    def _begin(self, step: int, *, keep_older: bool = False) -> None:
        started = time.monotonic()
        self.set_phase(SAVING)
        self._report_failure_of(self.checkpointer.wait)  # this save is made even where the one before failed
        self.last_step = step
        self.save(step, keep_older)
        self.pause_seconds = time.monotonic() - started

    def _report_failure_of(self, action: Callable[[], SavedCheckpoint | None]) -> None:
        """Run an action; report and count a CheckpointError instead of raising it."""
        try:
            self._report_saved(action())
        except CheckpointError as error:
            self.failed_saves, self.last_error = self.failed_saves + 1, str(error)
            logger.error("no checkpoint at step %d: %s", self.last_step, error)
            self.record_event(self.last_step, "save_failed", str(error))
            if self.console:
                what = f"no checkpoint at step {self.last_step}, training continues: "
                count = f" ({self.failed_saves} failed in a row; after {MAX_FAILED_SAVES} the run ends)"
                self.console.print(styled((what, "bold red"), str(error), count), soft_wrap=True)

    def _end_after_failures(self) -> None:
        """Raise CheckpointError when too many saves in a row have failed."""
        if self.failed_saves >= MAX_FAILED_SAVES:
            raise CheckpointError(
                f"{self.failed_saves} checkpoints in a row could not be saved, the last of step {self.last_step}: "
                f"{self.last_error} The run ends because it would lose all work since the last checkpoint."
            )

    def _report_saved(self, saved: SavedCheckpoint | None) -> None:
        if saved is None:
            return
        self.failed_saves = 0
        self.on_saved(saved.step)
        pause = f"training paused {self.pause_seconds:.2f} s"
        line = f"saved step {saved.step}: {pause}, complete after {saved.seconds:.2f} s"
        logger.info(line)
        if self.console:
            self.console.print(line)
