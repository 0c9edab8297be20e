"""Callbacks of the loop: progress, console, logs, metrics.jsonl, TensorBoard, and the end of a run."""

import json
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from aki_megatron.console import Console, styled
from aki_megatron.errors import DataError
from aki_megatron.supervise.attempts import End, record_end
from aki_megatron.supervise.evaluations import METRIC, Evaluation
from aki_megatron.supervise.events import EventRecorder
from aki_megatron.supervise.metrics import metrics_of
from aki_megatron.supervise.progress import ProgressTracker
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.step_log import StepLog
from aki_megatron.supervise.validations import ValidationReport, scalars_of
from aki_megatron.train.loop import Callback
from aki_megatron.types import ControlRequest, StepReport

logger = logging.getLogger("aki_megatron.train")

RECENT_STEPS = 50
"""Steps whose mean duration gives the time left."""

CONSOLE_METRICS = (("loss", "7.4f"), ("grad_norm", "8.3f"), ("lr", ".2e"))
"""Metrics of a console line, of the step it is printed after, and their formats."""


class ProgressCallback(Callback):
    """Count the steps in the ProgressTracker; on every rank, the first of the callbacks."""

    required = True

    def __init__(self, tracker: ProgressTracker) -> None:
        self.tracker = tracker

    def on_start(self, step: int) -> None:
        self.tracker.start(step)

    def on_step(self, step: int, report: StepReport) -> None:
        self.tracker.finish_step(step)

    def on_rollback(self, step: int) -> None:
        self.tracker.roll_back(step)


class ConsoleCallback(Callback):
    """Print metrics, throughput and the time left every ``interval`` steps; rank 0 only."""

    def __init__(self, steps: int, interval: int, console: Console) -> None:
        self.steps = steps
        self.interval = interval
        self.console = console
        self.durations: deque[float] = deque(maxlen=RECENT_STEPS)
        self.tokens = self.positions = 0
        self.seconds = 0.0
        self.skipped = 0

    def on_start(self, step: int) -> None:
        text = f"resuming after step {step:,}" if step else "starting"
        self.console.print(styled((text, "bold"), f", {self.steps:,} steps in all"))
        self.last_time = time.monotonic()

    def on_step(self, step: int, report: StepReport) -> None:
        now = time.monotonic()
        self.durations.append(now - self.last_time)
        self.last_time = now
        self.tokens += report.tokens
        self.positions += report.positions
        self.seconds += self.durations[-1]
        self.skipped += report.skipped
        if step % self.interval and step != self.steps:
            return
        left = timedelta(seconds=round((self.steps - step) * sum(self.durations) / len(self.durations)))
        metrics = "  ".join(f"{name} {getattr(report, name):{spec}}" for name, spec in CONSOLE_METRICS)
        line = (
            f"step {step:>{len(str(self.steps))}}/{self.steps}  {metrics}  "
            f"{self.tokens / max(self.seconds, 1e-9):9,.0f} tokens/s  "
            f"padding {1 - self.tokens / max(self.positions, 1):4.0%}  time left {left}"
        )
        self.console.print(styled(line, (f"  skipped {self.skipped}" if self.skipped else "", "red")))
        self.tokens, self.positions, self.seconds = 0, 0, 0.0

    def on_validation(self, step: int, report: ValidationReport) -> None:
        text = f"loss {report.loss:.4f}"
        if len(report.sources) > 1:
            text += f" ({', '.join(f'{name} {source.loss:.4f}' for name, source in report.sources.items())})"
        if report.accuracy is not None:
            text += f"  accuracy {report.accuracy:.1f} %"
        if report.bad_samples:
            text += f"  bad samples {report.bad_samples}"
        end = "  best so far" if report.is_best else ""
        what = (f"validation after step {step:,}:", "bold")
        self.console.print(styled(what, f" {text}  {report.seconds:.1f} s", (end, "green")), soft_wrap=True)
        self.last_time = time.monotonic()  # validation is not part of a step

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        what = (f"evaluation of step {evaluation.step:,}:", "bold")
        self.console.print(styled(what, f" {evaluation.text()}"), soft_wrap=True)

    def on_rollback(self, step: int) -> None:
        what = (f"rolled back to the checkpoint of step {step:,}", "bold yellow")
        self.console.print(styled(what, "; the data of the steps since are skipped"))
        self.last_time = time.monotonic()  # the time to load is not part of a step


class LogCallback(Callback):
    """Write every step, and every bad sample of this rank, to the rank's log; on every rank.

    ``describe_bad_samples`` returns which samples this rank could not read, and an empty text while there are none.
    """

    def __init__(self, describe_bad_samples: Callable[[], str], console: Console) -> None:
        self.describe_bad_samples = describe_bad_samples
        self.console = console
        self.last_description = ""

    def on_start(self, step: int) -> None:
        logger.info("start after step %d", step)

    def on_step(self, step: int, report: StepReport) -> None:
        logger.info("step %d loss %.6f norm %.4f seconds %.3f", step, report.loss, report.grad_norm, report.seconds)
        if report.skipped:
            logger.warning("step %d skipped: a gradient was not finite, or the step was refused", step)
        description = self.describe_bad_samples()
        # "3 bad samples in 120: ...": the number after " in " grows with every step, so compare what comes before
        if description and description.partition(" in ")[0] != self.last_description.partition(" in ")[0]:
            self.last_description = description
            logger.warning("step %d: %s", step, description)
            self.console.print(styled((f"step {step}:", "yellow"), f" {description}"), soft_wrap=True)

    def on_validation(self, step: int, report: ValidationReport) -> None:
        logger.info("validation after step %d loss %.6f seconds %.3f", step, report.loss, report.seconds)

    def on_rollback(self, step: int) -> None:
        logger.warning("rolled back to the checkpoint of step %d", step)

    def on_stop(self, step: int) -> None:
        logger.info("stopped after step %d", step)

    def on_end(self, step: int) -> None:
        logger.info("end after step %d", step)


class MetricsCallback(Callback):
    """Write metrics.jsonl: one object per step, each step once, whatever interrupted the run; rank 0 only."""

    required = True

    def __init__(self, path: Path, open_log: Callable[[Path], StepLog] = StepLog) -> None:
        """``open_log`` returns what writes the file."""
        self.path = path
        self.log = open_log(path)
        self._evaluations: list[Evaluation] = []

    def on_start(self, step: int) -> None:
        self.log.start(step)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._evaluations.append(evaluation)

    def on_step(self, step: int, report: StepReport) -> None:
        line = metrics_of(step, report)
        if self._evaluations:
            line[METRIC] = [evaluation.to_dict() for evaluation in self._evaluations]
            self._evaluations = []
        self.log.write(line)

    def on_rollback(self, step: int) -> None:
        self.log.start(step)

    def on_stop(self, step: int) -> None:
        self.log.close(in_checkpoint=True)

    def on_end(self, step: int) -> None:
        self.log.close()


class TensorBoardCallback(Callback):
    """Write all metrics as TensorBoard scalars every ``interval`` steps; rank 0 only."""

    def __init__(self, folder: Path, interval: int) -> None:
        self.folder = folder
        self.interval = interval

    def on_start(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second of imports that only this rank needs

        # TensorBoard drops the points of earlier attempts from purge_step on
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)

    def on_step(self, step: int, report: StepReport) -> None:
        if step % self.interval == 0:
            for name, value in metrics_of(step, report).items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, float(value), step)

    def on_validation(self, step: int, report: ValidationReport) -> None:
        for name, value in scalars_of(report).items():
            self.writer.add_scalar(name, value, step)

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        for name, value in evaluation.scalars().items():
            self.writer.add_scalar(name, value, evaluation.step)

    def on_rollback(self, step: int) -> None:
        self.on_end(step)
        self.on_start(step)

    def on_end(self, step: int) -> None:
        self.writer.close()


class ReportCallback(Callback):
    """Write the report of a run that is done; rank 0 only. ``write_report`` does."""

    def __init__(self, paths: RunPaths, write_report: Callable[[RunPaths], None]) -> None:
        self.paths = paths
        self.write_report = write_report

    def on_stop(self, step: int) -> None:
        pass

    def on_end(self, step: int) -> None:
        self.write_report(self.paths)


class RunFinalizer(Callback):
    """Record how an attempt ended, after all other callbacks; rank 0 only, the last of the callbacks.

    A run that is done gets the file DONE, one that was asked to stop gets STOPPED.<attempt>.
    """

    required = True

    def __init__(
        self,
        paths: RunPaths,
        attempt: str,
        *,
        stop_reason: Callable[[], str],
        record_event: EventRecorder,
        console: Console,
    ) -> None:
        """Create the callback.

        attempt      name of this attempt
        stop_reason  returns what asked for the stop
        """
        self.paths = paths
        self.attempt = attempt
        self.stop_reason = stop_reason
        self.record_event = record_event
        self.console = console

    def on_step_end(self, step: int, report: StepReport) -> None:
        # CheckpointCallback has saved, or has reported why it could not
        if ControlRequest.SAVE in report.control:
            self.paths.save.unlink(missing_ok=True)
            self.record_event(step, "save", f"requested by the file {self.paths.save.name}")

    def on_stop(self, step: int) -> None:
        reason = self.stop_reason()
        self.record_event(step, "stop", reason)
        # batch scripts look for this file; the checkpoint is complete
        self._write(self.paths.stopped(self.attempt), json.dumps({"step": step, "reason": reason}))
        self._record_end(step, "stopped", reason)
        text = f" after step {step:,} ({reason}); started again it resumes from there"
        self.console.print(styled(("stopped", "yellow"), text))

    def on_end(self, step: int) -> None:
        self._write(self.paths.done, str(step))
        self._record_end(step, "done", "")
        self.console.print(styled(("done", "green"), f" after {step:,} steps: {self.paths.report}"))

    def _write(self, path: Path, line: str) -> None:
        """Write a file that tells how the attempt ended. Raises DataError: without it the run has not ended well."""
        try:
            path.write_text(line + "\n")
        except OSError as error:
            with suppress(OSError):
                path.unlink()
            raise DataError(
                f"{path} cannot be written: {error.strerror}. The last checkpoint is complete: start the run "
                "again once the folder can be written."
            ) from error

    def _record_end(self, step: int, end: End, reason: str) -> None:
        try:
            record_end(self.paths, self.attempt, step=step, end=end, reason=reason)
        except OSError as error:  # DONE or STOPPED is there, and that is what counts
            logger.error("%s cannot be written: %s", self.paths.attempts, error)
