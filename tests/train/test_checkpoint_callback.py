"""When checkpoints are saved, and what happens when one fails; without an engine."""

import io

import pytest
from rich.console import Console
from step_reports import step_report

from aki_megatron.errors import CheckpointError
from aki_megatron.train.checkpoint_callback import CheckpointCallback
from aki_megatron.types import ControlRequest


class FullDisk:
    """A checkpointer that never has a save in progress; ``save`` fails at some steps."""

    def __init__(self, *full_at: int) -> None:
        self.full_at = full_at
        self.saved: list[int] = []

    def save(self, step: int) -> None:
        self.saved.append(step)
        if step in self.full_at:
            raise CheckpointError("the disk is full")

    def wait(self) -> None:
        return None

    poll = wait


def test_a_failed_checkpoint_ends_the_run_only_after_the_last_step() -> None:
    out, disk, events = io.StringIO(), FullDisk(2, 4, 5), []
    console = Console(file=out, width=200)
    callback = CheckpointCallback(disk, disk.save, 2, 5, console, record_event=lambda *event: events.append(event))  # type: ignore[arg-type]
    for step in range(1, 5):
        callback.on_step(step, step_report())
    assert disk.saved == [2, 4]
    assert events == [(step, "save_failed", "the disk is full") for step in (2, 4)]
    assert "no checkpoint at step 4" in out.getvalue() and "the disk is full" in out.getvalue()
    with pytest.raises(CheckpointError, match="the disk is full"):
        callback.on_step(5, step_report())


def test_a_requested_checkpoint_may_fail_but_not_that_of_a_stop() -> None:
    out, disk = io.StringIO(), FullDisk(3, 5)
    callback = CheckpointCallback(disk, disk.save, 100, 200, Console(file=out, width=200))  # type: ignore[arg-type]
    for step in range(1, 5):
        callback.on_step(step, step_report(control=ControlRequest.SAVE if step == 3 else ControlRequest.NONE))
    assert disk.saved == [3] and "no checkpoint at step 3, training continues" in out.getvalue()
    with pytest.raises(CheckpointError, match="the disk is full"):
        callback.on_step(5, step_report(control=ControlRequest.STOP))


@pytest.mark.parametrize("step", [0, 4])
def test_only_a_new_run_is_saved_at_its_start(step: int) -> None:
    disk = FullDisk()
    for save_at_start in (False, True):
        CheckpointCallback(disk, disk.save, 2, 5, None, save_at_start=save_at_start).on_start(step)  # type: ignore[arg-type]
    assert disk.saved == ([] if step else [0])
