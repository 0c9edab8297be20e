"""Metrics, console and checkpoint callbacks, without an engine."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from aki_megatron.errors import CheckpointError
from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.events import read_events, record
from aki_megatron.supervise.run_paths import RunPaths, read_metrics, rewind_lines
from aki_megatron.train.callbacks import CheckpointCallback, ConsoleCallback, MetricsCallback, RunFinalizer
from aki_megatron.types import ControlRequest, StepReport

FIELDS = [
    "step",
    "loss",
    "grad_norm",
    "lr",
    "supervised_tokens",
    "tokens",
    "places",
    "images",
    "bad_samples",
    "seconds",
    "skipped",
]


def report(loss: float = 1.5, *, skipped: bool = False, wish: ControlRequest = ControlRequest.NONE) -> StepReport:
    return StepReport(
        loss=loss,
        grad_norm=2.0,
        lr=1e-3,
        supervised_tokens=7,
        tokens=40,
        places=50,
        images=2,
        bad_samples=0,
        seconds=0.5,
        skipped=skipped,
        wish=wish,
    )


def test_metrics_hold_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsCallback(path)
    first.on_start(0)
    for step in range(1, 6):
        first.after_step(step, report(step))
    # killed in the middle of a line, with its last checkpoint at step 3
    path.write_text(path.read_text() + '{"step": 6, "lo')
    second = MetricsCallback(path)
    second.on_start(3)
    for step in range(4, 7):
        second.after_step(step, report(10.0 * step))
    second.on_end(6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [1, 2, 3, 40, 50, 60]
    assert list(lines[0]) == [*FIELDS, "tokens_per_second"]
    assert lines[0]["tokens_per_second"] == 80


def test_a_skipped_step_is_strict_json(tmp_path: Path) -> None:
    hook = MetricsCallback(tmp_path / "metrics.jsonl")
    hook.on_start(0)
    hook.after_step(1, report(float("nan"), skipped=True))
    (line,) = read_metrics(hook.path)
    assert line["loss"] is None and line["skipped"] is True


def test_a_missing_metrics_file_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    rewind_lines(path, 0)
    assert path.read_text() == ""


def test_console_prints_when_it_is_time_and_counts_skipped_steps() -> None:
    out = io.StringIO()
    hook = ConsoleCallback(25, 10, Console(file=out, width=200, highlight=False))
    hook.on_start(0)
    for step in range(1, 26):
        hook.after_step(step, report(skipped=step == 3))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["10/25", "20/25", "25/25"]
    assert all("loss" in line and "left" in line and "skipped 1" in line for line in lines[1:])


class FullDisk:
    """A saver that is never behind; ``save`` fails at some steps."""

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


def test_a_failed_checkpoint_stops_the_run_only_at_the_end() -> None:
    out, disk, noted = io.StringIO(), FullDisk(2, 4, 5), []
    console = Console(file=out, width=200)
    hook = CheckpointCallback(disk, disk.save, 2, 5, console, note=lambda *event: noted.append(event))  # type: ignore[arg-type]
    for step in range(1, 5):
        hook.after_step(step, report())
    assert disk.saved == [2, 4]
    assert noted == [(step, "save_failed", "the disk is full") for step in (2, 4)]
    assert "no checkpoint at step 4" in out.getvalue() and "the disk is full" in out.getvalue()
    with pytest.raises(CheckpointError, match="the disk is full"):
        hook.after_step(5, report())


def test_a_checkpoint_that_is_wished_for_may_fail_but_not_that_of_a_stop() -> None:
    out, disk = io.StringIO(), FullDisk(3, 5)
    hook = CheckpointCallback(disk, disk.save, 100, 200, Console(file=out, width=200))  # type: ignore[arg-type]
    for step in range(1, 5):
        hook.after_step(step, report(wish=ControlRequest.SAVE if step == 3 else ControlRequest.NONE))
    assert disk.saved == [3] and "no checkpoint at step 3, training goes on" in out.getvalue()
    with pytest.raises(CheckpointError, match="the disk is full"):
        hook.after_step(5, report(wish=ControlRequest.STOP))


@pytest.mark.parametrize("step", [0, 4])
def test_only_a_new_run_is_saved_at_its_start(step: int) -> None:
    disk = FullDisk()
    for at_start in (False, True):
        CheckpointCallback(disk, disk.save, 2, 5, None, at_start=at_start).on_start(step)  # type: ignore[arg-type]
    assert disk.saved == ([] if step else [0])


def test_metrics_are_rewound_by_a_rollback(tmp_path: Path) -> None:
    hook = MetricsCallback(tmp_path / "metrics.jsonl")
    hook.on_start(0)
    for step in (1, 2, 3):
        hook.after_step(step, report(step))
    hook.on_rollback(1)
    hook.after_step(2, report(20))
    hook.on_stop(2)
    assert [(line["step"], line["loss"]) for line in read_metrics(hook.path)] == [(1, 1), (2, 20)]


def end_hook(folder: RunPaths) -> RunFinalizer:
    def write_report(folder: RunPaths) -> None:
        assert not folder.done.exists(), "DONE is the last word"
        folder.report.touch()

    return RunFinalizer(
        folder,
        "77.1",
        lambda: "SIGUSR1",
        lambda step, kind, text: record(folder, step, kind, text),
        write_report,
        Console(quiet=True),
    )


def test_an_attempt_that_stops_says_where_and_why(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path)
    end_hook(folder).on_stop(7)
    assert json.loads((tmp_path / "STOPPED.77.1").read_text()) == {"step": 7, "reason": "SIGUSR1"}
    assert not folder.done.exists() and not folder.report.exists()
    (attempt,) = read_attempts(folder)
    assert (attempt.name, attempt.step, attempt.end, attempt.reason) == ("77.1", 7, "stopped", "SIGUSR1")
    assert [(event["kind"], event["step"]) for event in read_events(folder)] == [("stop", 7)]


def test_a_run_that_is_done_says_so(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path)
    end_hook(folder).on_end(9)
    assert folder.done.read_text() == "9\n" and folder.report.exists() and not list(tmp_path.glob("STOPPED*"))
    assert [(attempt.step, attempt.end) for attempt in read_attempts(folder)] == [(9, "done")]


def test_a_wish_for_a_checkpoint_goes_once_it_is_granted(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path)
    folder.save.touch()
    hook = end_hook(folder)
    hook.after_step(1, report())
    assert folder.save.exists()
    hook.after_step(2, report(wish=ControlRequest.SAVE))
    assert not folder.save.exists()
    assert [(event["kind"], event["step"]) for event in read_events(folder)] == [("save", 2)]
