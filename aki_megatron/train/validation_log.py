"""Write validation.jsonl: one object per validation, each step once, whatever interrupted the run."""

from collections.abc import Callable
from pathlib import Path

from aki_megatron.supervise.jsonl import has_step, read_intact_lines
from aki_megatron.supervise.step_log import StepLog
from aki_megatron.supervise.validations import ValidationReport, line_of
from aki_megatron.train.loop import Callback


class ValidationLogCallback(Callback):
    """Write the line of every validation; rank 0 only."""

    required = True

    def __init__(self, path: Path, open_log: Callable[[Path], StepLog] = StepLog) -> None:
        """``open_log`` returns what writes the file."""
        self.path = path
        self.log = open_log(path)
        self.last_step = -1
        """Of the last line of the file."""

    def on_start(self, step: int) -> None:
        self.log.start(step)
        self.last_step = max((line["step"] for line in read_intact_lines(self.path, has_step)), default=-1)

    def on_validation(self, step: int, report: ValidationReport) -> None:
        if step <= self.last_step:  # a start may repeat the validation of its first step
            self.log.start(step - 1)
        self.log.write(line_of(step, report))
        self.last_step = step

    def on_rollback(self, step: int) -> None:
        self.on_start(step)

    def on_stop(self, step: int) -> None:
        self.log.close(in_checkpoint=True)

    def on_end(self, step: int) -> None:
        self.log.close()
