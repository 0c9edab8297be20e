"""When checkpoints are saved, and what happens when one fails; without an engine."""

import io
from pathlib import Path

import pytest
from step_reports import step_report

from aki_megatron.checkpoint.checkpointer import SavedCheckpoint
from aki_megatron.console import Console
from aki_megatron.errors import CheckpointError
from aki_megatron.train.checkpoint_callback import CheckpointCallback
from aki_megatron.types import ControlRequest


class FullDisk:
    """A checkpointer that never has a save in progress; ``save`` fails at some steps."""

    def __init__(self, *full_at: int) -> None:
        self.full_at = full_at
        self.saved: list[int] = []
        self.keeping_older: list[int] = []

    def save(self, step: int, keep_older: bool) -> None:
        self.saved.append(step)
        if keep_older:
            self.keeping_older.append(step)
        if step in self.full_at:
            raise CheckpointError("the disk is full")

    def wait(self) -> None:
        return None

    poll = wait


def test_a_failed_checkpoint_ends_the_run_only_after_the_last_step() -> None:
    out, disk, events = io.StringIO(), FullDisk(2, 4, 5), []
    console = Console(out, width=200)
    callback = CheckpointCallback(disk, disk.save, 2, 5, console, record_event=lambda *event: events.append(event))  # type: ignore[arg-type]
    for step in range(1, 5):
        callback.on_step_end(step, step_report())
    assert disk.saved == [2, 4]
    assert events == [(step, "save_failed", "the disk is full") for step in (2, 4)]
    assert "no checkpoint at step 4" in out.getvalue() and "the disk is full" in out.getvalue()
    with pytest.raises(CheckpointError, match="the disk is full"):
        callback.on_step_end(5, step_report())


def test_a_requested_checkpoint_may_fail_but_not_that_of_a_stop() -> None:
    out, disk = io.StringIO(), FullDisk(3, 5)
    callback = CheckpointCallback(disk, disk.save, 100, 200, Console(out, width=200))  # type: ignore[arg-type]
    for step in range(1, 5):
        callback.on_step_end(step, step_report(control=ControlRequest.SAVE if step == 3 else ControlRequest.NONE))
    assert disk.saved == [3] and "no checkpoint at step 3, training continues" in out.getvalue()
    with pytest.raises(CheckpointError, match="the disk is full"):
        callback.on_step_end(5, step_report(control=ControlRequest.STOP))


@pytest.mark.parametrize("step", [0, 4])
def test_only_a_new_run_is_saved_at_its_start(step: int) -> None:
    disk = FullDisk()
    for save_at_start in (False, True):
        CheckpointCallback(disk, disk.save, 2, 5, None, save_at_start=save_at_start).on_start(step)  # type: ignore[arg-type]
    assert disk.saved == ([] if step else [0])


def test_three_failed_checkpoints_in_a_row_end_the_run() -> None:
    out, disk, events = io.StringIO(), FullDisk(2, 4, 8, 10, 12), []
    callback = CheckpointCallback(
        disk, disk.save, 2, 100, Console(out, width=400), record_event=lambda *event: events.append(event)
    )  # type: ignore[arg-type]
    disk.wait = lambda: SavedCheckpoint(6, Path("step_000006"), 1.0) if disk.saved[-1:] == [6] else None
    for step in range(1, 12):
        callback.on_step_end(step, step_report())
    assert "no checkpoint at step 2, training continues: the disk is full (1 failed in a row" in out.getvalue()
    with pytest.raises(
        CheckpointError, match="3 checkpoints in a row could not be saved, .* step 12: the disk is full"
    ):
        callback.on_step_end(12, step_report())
    assert [step for step, kind, _ in events if kind == "save_failed"] == [2, 4, 8, 10, 12]


def test_a_checkpoint_waits_while_steps_are_skipped() -> None:
    disk = FullDisk()
    callback = CheckpointCallback(disk, disk.save, 2, 100, None)  # type: ignore[arg-type]
    for step in range(1, 9):
        callback.on_step_end(step, step_report(skipped=step in (4, 5, 6)))
    assert disk.saved == [2, 7, 8] and not disk.keeping_older


def test_a_last_checkpoint_among_skipped_steps_removes_no_older_one() -> None:
    for control, steps in ((ControlRequest.NONE, 5), (ControlRequest.STOP, 100), (ControlRequest.SAVE, 100)):
        disk = FullDisk()
        callback = CheckpointCallback(disk, disk.save, 2, steps, None)  # type: ignore[arg-type]
        callback.on_step_end(5, step_report(skipped=True, control=control))
        assert disk.saved == disk.keeping_older == [5]
