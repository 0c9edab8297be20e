"""Write validation.jsonl: one object per validation, each step once, whatever interrupted the run."""

from collections.abc import Callable
from pathlib import Path

from aki_megatron.supervise.jsonl import has_step, read_intact_lines
from aki_megatron.supervise.step_log import StepLog
from aki_megatron.supervise.validations import ValidationReport, line_of
from aki_megatron.train.loop import Callback


class ValidationLogCallback(Callback):
    """Write the line of every validation; rank 0 only. A run that never validates has no file."""

    required = True

    def __init__(self, path: Path, open_log: Callable[[Path], StepLog] = StepLog) -> None:
        """``open_log`` returns what writes the file."""
        self.path = path
        self.log = open_log(path)
        self.is_open = False
        self.last_step = -1
        """Of the last line of the file."""

    def on_start(self, step: int) -> None:
        if self.path.exists():
            self._open(step)

    def on_validation(self, step: int, report: ValidationReport) -> None:
        if not self.is_open or step <= self.last_step:  # a start may repeat the validation of its first step
            self._open(step - 1)
        self.log.write(line_of(step, report))
        self.last_step = step

    def on_rollback(self, step: int) -> None:
        if self.is_open:
            self._open(step)

    def on_stop(self, step: int) -> None:
        if self.is_open:
            self.log.close(in_checkpoint=True)

    def on_end(self, step: int) -> None:
        if self.is_open:
            self.log.close()

    def _open(self, step: int) -> None:
        """Open the file and drop the lines of steps after ``step``."""
        self.log.start(step)
        self.is_open = True
        self.last_step = max((line["step"] for line in read_intact_lines(self.path, has_step)), default=-1)
