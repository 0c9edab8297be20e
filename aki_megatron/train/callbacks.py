"""Hooks around the loop: console, metrics file, TensorBoard, checkpoints, the end of a run."""

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from aki_megatron.checkpoint.checkpointer import Checkpointer, Saved
from aki_megatron.errors import CheckpointError
from aki_megatron.supervise.attempts import end_attempt
from aki_megatron.supervise.events import Kind
from aki_megatron.supervise.run_paths import RunPaths, metrics_line, rewind_lines
from aki_megatron.train.loop import Callback
from aki_megatron.types import ControlRequest, StepReport

logger = logging.getLogger("aki_megatron.train")

RECENT_STEPS = 50
"""Steps whose mean duration gives the time that is left."""


class ConsoleCallback(Callback):
    """A line per ``every`` steps with loss, rate, norm, throughput and the time that is left; rank 0 only."""

    def __init__(self, steps: int, every: int, console: Console) -> None:
        self.steps = steps
        self.every = every
        self.console = console
        self.recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self.tokens = self.places = 0
        self.seconds = 0.0
        self.skipped = 0

    def on_start(self, step: int) -> None:
        """Say where the run stands."""
        where = f"resuming after step {step:,}" if step else "starting"
        self.console.print(f"[bold]{where}[/bold], {self.steps:,} steps in all")
        self.last = time.monotonic()

    def after_step(self, step: int, report: StepReport) -> None:
        """Print when it is time."""
        now = time.monotonic()
        self.recent.append(now - self.last)
        self.last = now
        self.tokens += report.tokens
        self.places += report.places
        self.seconds += self.recent[-1]
        self.skipped += report.skipped
        if step % self.every and step != self.steps:
            return
        left = timedelta(seconds=round((self.steps - step) * sum(self.recent) / len(self.recent)))
        line = (
            f"step {step:>{len(str(self.steps))}}/{self.steps}  loss {report.loss:7.4f}  norm {report.grad_norm:8.3f}  "
            f"lr {report.lr:.2e}  {self.tokens / max(self.seconds, 1e-9):9,.0f} tokens/s  "
            f"{self.tokens / max(self.places, 1):4.0%} real  left {left}"
        )
        self.console.print(line + (f"  [red]skipped {self.skipped}[/red]" if self.skipped else ""))
        self.tokens, self.places, self.seconds = 0, 0, 0.0

    def on_rollback(self, step: int) -> None:
        """Say so; what loading took is no step's time."""
        self.console.print(
            f"[bold yellow]back at the checkpoint of step {step:,}[/]; the data of the steps since are left out"
        )
        self.last = time.monotonic()


class LogCallback(Callback):
    """Every step into this rank's log file, and every bad sample this rank meets; every rank.

    ``describe_losses`` says which samples this rank could not read, and is empty while there are none.
    """

    def __init__(self, describe_losses: Callable[[], str], console: Console) -> None:
        self.describe_losses = describe_losses
        self.console = console
        self.described = ""

    def on_start(self, step: int) -> None:
        """Mark the start: a log holds every attempt of a run."""
        logger.info("start after step %d", step)

    def after_step(self, step: int, report: StepReport) -> None:
        """One line, and another where something was wrong."""
        logger.info("step %d loss %.6f norm %.4f seconds %.3f", step, report.loss, report.grad_norm, report.seconds)
        if report.skipped:
            logger.warning("step %d skipped: a gradient was not finite, or the step was refused", step)
        described = self.describe_losses()
        # The count grows with every sample; what is worth saying is that a bad one came.
        if described and described.partition(" in ")[0] != self.described.partition(" in ")[0]:
            self.described = described
            logger.warning("step %d: %s", step, described)
            self.console.print(f"[yellow]step {step}:[/yellow] {described}", soft_wrap=True)

    def on_rollback(self, step: int) -> None:
        """One line."""
        logger.warning("back at the checkpoint of step %d", step)

    def on_stop(self, step: int) -> None:
        """Mark the stop."""
        logger.info("stopped after step %d", step)

    def on_end(self, step: int) -> None:
        """Mark the end."""
        logger.info("end after step %d", step)


class MetricsCallback(Callback):
    """metrics.jsonl: one object per step, each step once, whatever interrupted the run; rank 0 only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None

    def on_start(self, step: int) -> None:
        """Drop lines of steps that are done again, then append."""
        rewind_lines(self.path, step)
        self.file = self.path.open("a")

    def after_step(self, step: int, report: StepReport) -> None:
        """Append a line and hand it to the operating system, so that a killed process loses none."""
        assert self.file is not None
        self.file.write(json.dumps(metrics_line(step, report), allow_nan=False) + "\n")
        self.file.flush()

    def on_rollback(self, step: int) -> None:
        """Drop the lines of steps that are done again."""
        self.on_end(step)
        self.on_start(step)

    def on_end(self, step: int) -> None:
        """Close the file."""
        assert self.file is not None
        self.file.close()


class TensorBoardCallback(Callback):
    """Scalars under <run>/tensorboard; rank 0 only."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder = folder
        self.every = every

    def on_start(self, step: int) -> None:
        """Open the event file; points after ``step`` of an earlier attempt are purged."""
        from torch.utils.tensorboard import SummaryWriter  # half a second of imports that only this rank needs

        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def after_step(self, step: int, report: StepReport) -> None:
        """Add a point of every metric when it is time."""
        if step % self.every == 0:
            for name, value in metrics_line(step, report).items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, float(value), step)

    def on_rollback(self, step: int) -> None:
        """Purge the points of steps that are done again."""
        self.on_end(step)
        self.on_start(step)

    def on_end(self, step: int) -> None:
        """Close the event file."""
        self.writer.close()


class CheckpointCallback(Callback):
    """A checkpoint every ``every`` steps, where one is wished for, and after the last step; every rank, for saving is
    collective.

    A checkpoint that cannot be written (full disk) is reported and training goes on; only the last one, of the run or
    before a stop, must succeed.
    """

    def __init__(
        self,
        saver: Checkpointer,
        save: Callable[[int], None],
        every: int,
        steps: int,
        console: Console | None,
        *,
        at_start: bool = False,
        at: Callable[[str], None] = lambda place: None,
        note: Callable[[int, Kind, str], None] = lambda step, kind, text: None,
    ) -> None:
        """
        save      hands the state after a step to ``saver``
        at_start  saves a new run before its first step, too
        at        told when this rank begins to save, or to wait for the save before
        note      told of checkpoints that could not be written
        """
        self.saver = saver
        self.save = save
        self.every = every
        self.steps = steps
        self.console = console
        self.at_start = at_start
        self.at = at
        self.note = note
        self.saving = 0
        """Step of the last save that was begun."""
        self.pause = 0.0
        """Seconds that training waited for it."""

    def on_start(self, step: int) -> None:
        """Save a new run where that is asked for."""
        if self.at_start and step == 0:
            self._attempt(lambda: self._begin(0))

    def after_step(self, step: int, report: StepReport) -> None:
        """Save when it is time, and tell what became of the last save."""
        if step == self.steps or ControlRequest.STOP in report.wish:
            self.save_now(step)
        elif ControlRequest.SAVE in report.wish:
            self._attempt(lambda: self.save_now(step))
        elif step % self.every == 0:
            self._attempt(lambda: self._begin(step))
        self._attempt(self.saver.poll)

    def save_now(self, step: int) -> None:
        """A checkpoint that is complete on return. Errors: CheckpointError on every rank."""
        self._begin(step)
        self._tell(self.saver.wait())

    def _begin(self, step: int) -> None:
        started = time.monotonic()
        self.at("saves a checkpoint")
        self._attempt(self.saver.wait)  # an error of the last save is no reason to leave this one out
        self.saving = step
        self.save(step)
        self.pause = time.monotonic() - started

    def _attempt(self, action: Callable[[], Saved | None]) -> None:
        try:
            self._tell(action())
        except CheckpointError as error:
            logger.error("no checkpoint at step %d: %s", self.saving, error)
            with suppress(OSError):  # the disk may be full for this line, too
                self.note(self.saving, "save_failed", str(error))
            if self.console:
                text = f"[bold red]no checkpoint at step {self.saving}, training goes on:[/] {escape(str(error))}"
                self.console.print(text)

    def _tell(self, saved: Saved | None) -> None:
        if saved is None:
            return
        line = f"saved step {saved.step}: training paused {self.pause:.2f} s, complete after {saved.seconds:.2f} s"
        logger.info(line)
        if self.console:
            self.console.print(line)


class RunFinalizer(Callback):
    """Says how an attempt ended, once everything else has ended; rank 0 only, the last of the callbacks.

    A run that is done gets its report and DONE, one that was asked to stop gets STOPPED.<attempt>.
    """

    def __init__(
        self,
        folder: RunPaths,
        attempt: str,
        why_stop: Callable[[], str],
        note: Callable[[int, Kind, str], None],
        write_report: Callable[[RunPaths], None],
        console: Console,
    ) -> None:
        self.folder = folder
        self.attempt = attempt
        self.why_stop = why_stop
        self.note = note
        self.write_report = write_report
        self.console = console

    def after_step(self, step: int, report: StepReport) -> None:
        """Take a person's wish for a checkpoint away once it is granted, or has failed: CheckpointCallback has said which."""
        if ControlRequest.SAVE in report.wish:
            self.folder.save.unlink(missing_ok=True)
            self.note(step, "save", f"{self.folder.save.name} was there")

    def on_stop(self, step: int) -> None:
        """The checkpoint is complete; batch scripts look for this file."""
        reason = self.why_stop()
        self.note(step, "stop", reason)
        self.folder.stopped(self.attempt).write_text(json.dumps({"step": step, "reason": reason}) + "\n")
        end_attempt(self.folder, self.attempt, step=step, end="stopped", reason=reason)
        self.console.print(
            f"[yellow]stopped[/yellow] after step {step:,} ({reason}); started again it goes on from there"
        )

    def on_end(self, step: int) -> None:
        """The run is finished when DONE exists: success is judged by it everywhere."""
        self.write_report(self.folder)
        self.folder.done.write_text(f"{step}\n")
        end_attempt(self.folder, self.attempt, step=step, end="done", reason="")
        self.console.print(f"[green]done[/green] after {step:,} steps: {self.folder.report}")
