"""Hooks around the loop: console, metrics file, TensorBoard, checkpoints, the end of a run."""

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from rich.console import Console

from aki_megatron.flow import CheckpointError, StepReport
from aki_megatron.train.folder import RunFolder, metrics_line, rewind_lines

logger = logging.getLogger("aki_megatron.train")

RECENT_STEPS = 50
"""Steps whose mean duration gives the time that is left."""


class ConsoleHook:
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

    def on_end(self, step: int) -> None:
        """Nothing: DoneHook speaks last."""


class LogHook:
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
            logger.warning("step %d skipped: a gradient was not finite", step)
        described = self.describe_losses()
        # The count grows with every sample; what is worth saying is that a bad one came.
        if described and described.partition(" in ")[0] != self.described.partition(" in ")[0]:
            self.described = described
            logger.warning("step %d: %s", step, described)
            self.console.print(f"[yellow]step {step}:[/yellow] {described}", soft_wrap=True)

    def on_end(self, step: int) -> None:
        """Mark the end."""
        logger.info("end after step %d", step)


class MetricsHook:
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

    def on_end(self, step: int) -> None:
        """Close the file."""
        assert self.file is not None
        self.file.close()


class TensorBoardHook:
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

    def on_end(self, step: int) -> None:
        """Close the event file."""
        self.writer.close()


class SaveHook:
    """A checkpoint every ``every`` steps and after the last one; every rank (saving is collective).

    A checkpoint that cannot be written (full disk) is reported and training goes on; only the last one must succeed.
    """

    def __init__(self, save: Callable[[int], object], every: int, steps: int, console: Console | None) -> None:
        self.save = save
        self.every = every
        self.steps = steps
        self.console = console

    def on_start(self, step: int) -> None:
        """Nothing to do."""

    def after_step(self, step: int, report: StepReport) -> None:
        """Save when it is time."""
        if step % self.every and step != self.steps:
            return
        try:
            self.save(step)
        except CheckpointError as error:
            if step == self.steps:
                raise
            logger.error("no checkpoint at step %d: %s", step, error)
            if self.console:
                self.console.print(f"[bold red]no checkpoint at step {step}, training goes on:[/bold red] {error}")

    def on_end(self, step: int) -> None:
        """Nothing: the last step is saved already."""


class DoneHook:
    """Write the report and DONE once everything else has ended; rank 0 only, the last of the hooks."""

    def __init__(self, folder: RunFolder, write_report: Callable[[RunFolder], None], console: Console) -> None:
        self.folder = folder
        self.write_report = write_report
        self.console = console

    def on_start(self, step: int) -> None:
        """Nothing to do."""

    def after_step(self, step: int, report: StepReport) -> None:
        """Nothing to do."""

    def on_end(self, step: int) -> None:
        """The run is finished when DONE exists: success is judged by it everywhere."""
        self.write_report(self.folder)
        self.folder.done.write_text(f"{step}\n")
        self.console.print(f"[green]done[/green] after {step:,} steps: {self.folder.report}")
