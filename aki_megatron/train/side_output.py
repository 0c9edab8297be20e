"""Outputs that training can do without: their first failure is reported, and training goes on without them."""

import logging
from collections.abc import Callable, Iterable

from aki_megatron.console import IsolatedConsole, styled
from aki_megatron.supervise.evaluations import Evaluation
from aki_megatron.supervise.events import EventRecorder
from aki_megatron.supervise.validations import ValidationReport
from aki_megatron.train.loop import Callback
from aki_megatron.types import StepReport

logger = logging.getLogger("aki_megatron.train")


class SideOutput(Callback):
    """Run a callback until it fails; report that once, and call it no more in this attempt."""

    required = True

    def __init__(self, callback: Callback, report_failure: Callable[[str], None]) -> None:
        """``report_failure`` is told what failed."""
        self.callback = callback
        self.report_failure = report_failure
        self.failed = False

    def on_start(self, step: int) -> None:
        self._run(lambda: self.callback.on_start(step))

    def on_step(self, step: int, report: StepReport) -> None:
        self._run(lambda: self.callback.on_step(step, report))

    def on_validation(self, step: int, report: ValidationReport) -> None:
        self._run(lambda: self.callback.on_validation(step, report))

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        self._run(lambda: self.callback.on_evaluation(step, evaluation))

    def on_step_end(self, step: int, report: StepReport) -> None:
        self._run(lambda: self.callback.on_step_end(step, report))

    def on_rollback(self, step: int) -> None:
        self._run(lambda: self.callback.on_rollback(step))

    def on_stop(self, step: int) -> None:
        self._run(lambda: self.callback.on_stop(step))

    def on_end(self, step: int) -> None:
        self._run(lambda: self.callback.on_end(step))

    def _run(self, action: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker, a terminal or a plot raises
            self.failed = True
            name = type(self.callback).__name__
            logger.exception("%s failed", name)
            self.report_failure(f"{name} is off until the next start: {type(error).__name__}: {error}")
            try:
                self.callback.on_failure()
            except Exception:
                logger.exception("%s failed to clean up", name)


def isolate_side_outputs(callbacks: Iterable[Callback], report_failure: Callable[[str], None]) -> list[Callback]:
    """Wrap every callback that does not declare that the run depends on it (``Callback.required``)."""
    return [callback if callback.required else SideOutput(callback, report_failure) for callback in callbacks]


class OutputFailures:
    """Log, record and print that an output failed after a step."""

    def __init__(self, current_step: Callable[[], int], record_event: EventRecorder, console: IsolatedConsole) -> None:
        """``current_step`` returns the optimizer steps done."""
        self._current_step = current_step
        self._record_event = record_event
        self._console = console

    def report(self, text: str) -> None:
        """Report what failed, and what that means."""
        step = self._current_step()
        logger.error("after step %d: %s", step, text)
        self._record_event(step, "output_failed", text)
        self._console.print(
            styled((f"training goes on after step {step:,}, but ", "bold yellow"), text), soft_wrap=True
        )

    def report_console(self, error: Exception) -> None:
        """Report that the console failed, which prints nothing any more."""
        self.report(f"nothing can be printed any more: {type(error).__name__}: {error}")
