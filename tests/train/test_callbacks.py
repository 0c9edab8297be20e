"""Metrics, console and TensorBoard callbacks, and the end of a run, without an engine."""

import io
import json
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from step_reports import step_report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from aki_megatron.console import Console
from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.events import read_events, record_event
from aki_megatron.supervise.jsonl import discard_steps_after
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.callbacks import ConsoleCallback, MetricsCallback, RunFinalizer, TensorBoardCallback
from aki_megatron.types import ControlRequest, StepReport


def test_metrics_hold_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsCallback(path)
    first.on_start(0)
    for step in range(1, 6):
        first.on_step(step, step_report(step))
    # killed in the middle of a line, with its last checkpoint at step 3
    path.write_text(path.read_text() + '{"step": 6, "lo')
    second = MetricsCallback(path)
    second.on_start(3)
    for step in range(4, 7):
        second.on_step(step, step_report(10.0 * step))
    second.on_end(6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == [1, 2, 3, 40, 50, 60]
    assert list(lines[0]) == [
        "step",
        *(field.name for field in fields(StepReport) if field.name != "control"),
        "tokens_per_second",
    ]
    assert lines[0]["tokens_per_second"] == 80


def test_a_skipped_step_is_strict_json(tmp_path: Path) -> None:
    callback = MetricsCallback(tmp_path / "metrics.jsonl")
    callback.on_start(0)
    callback.on_step(1, step_report(float("nan"), skipped=True))
    (line,) = read_metrics(callback.path)
    assert line["loss"] is None and line["skipped"] is True


def test_a_missing_metrics_file_is_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    discard_steps_after(path, 0)
    assert path.read_text() == ""


def test_the_console_prints_at_the_interval_and_counts_skipped_steps() -> None:
    out = io.StringIO()
    callback = ConsoleCallback(25, 10, Console(out, width=200))
    callback.on_start(0)
    for step in range(1, 26):
        callback.on_step(step, step_report(skipped=step == 3))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["10/25", "20/25", "25/25"]
    assert all("loss" in line and "time left" in line and "skipped 1" in line for line in lines[1:])


def test_a_rollback_discards_later_metrics(tmp_path: Path) -> None:
    callback = MetricsCallback(tmp_path / "metrics.jsonl")
    callback.on_start(0)
    for step in (1, 2, 3):
        callback.on_step(step, step_report(step))
    callback.on_rollback(1)
    callback.on_step(2, step_report(20))
    callback.on_stop(2)
    assert [(line["step"], line["loss"]) for line in read_metrics(callback.path)] == [(1, 1), (2, 20)]


def run_finalizer(paths: RunPaths) -> RunFinalizer:
    return RunFinalizer(
        paths,
        "77.1",
        stop_reason=lambda: "SIGUSR1",
        record_event=partial(record_event, paths),
        console=Console(quiet=True),
    )


def test_an_attempt_that_stops_records_where_and_why(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    run_finalizer(paths).on_stop(7)
    assert json.loads((tmp_path / "STOPPED.77.1").read_text()) == {"step": 7, "reason": "SIGUSR1"}
    assert not paths.done.exists() and not paths.report.exists()
    (attempt,) = read_attempts(paths)
    assert (attempt.name, attempt.step, attempt.end, attempt.reason) == ("77.1", 7, "stopped", "SIGUSR1")
    assert [(event["kind"], event["step"]) for event in read_events(paths)] == [("stop", 7)]


def test_a_run_that_is_done_gets_the_file_done(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    run_finalizer(paths).on_end(9)
    assert paths.done.read_text() == "9\n" and not list(tmp_path.glob("STOPPED*"))
    assert [(attempt.step, attempt.end) for attempt in read_attempts(paths)] == [(9, "done")]


def test_the_file_save_is_removed_once_the_checkpoint_was_handled(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.save.touch()
    callback = run_finalizer(paths)
    callback.on_step_end(1, step_report())
    assert paths.save.exists()
    callback.on_step_end(2, step_report(control=ControlRequest.SAVE))
    assert not paths.save.exists()
    assert [(event["kind"], event["step"]) for event in read_events(paths)] == [("save", 2)]


def tracker_report(step: int) -> StepReport:
    """Step 4 was skipped; its norm is infinite."""
    return step_report(1 / step, grad_norm=float("inf") if step == 4 else 2.0, skipped=step == 4)


def test_tensorboard_has_every_second_step_and_no_infinite_norm(tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path, interval=2)
    callback.on_start(0)
    for step in range(1, 7):
        callback.on_step(step, tracker_report(step))
    callback.on_end(6)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = {point.step: point.value for point in events.Scalars("loss")}
    assert losses == pytest.approx({2: 1 / 2, 4: 1 / 4, 6: 1 / 6})
    assert [point.step for point in events.Scalars("grad_norm")] == [2, 6]


def test_tensorboard_after_a_rollback_has_the_new_points(tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path, interval=1)
    callback.on_start(0)
    for step in (1, 2, 3):
        callback.on_step(step, tracker_report(step))
    callback.on_rollback(1)
    callback.on_step(2, tracker_report(20))
    callback.on_stop(2)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    losses = {point.step: point.value for point in events.Scalars("loss")}
    assert losses == pytest.approx({1: 1.0, 2: 1 / 20})
