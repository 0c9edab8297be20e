"""Metrics, console and checkpoint hooks, without an engine."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from aki_megatron.flow import CheckpointError, StepReport
from aki_megatron.train.folder import read_metrics, rewind_lines
from aki_megatron.train.hooks import ConsoleHook, MetricsHook, SaveHook

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


def report(loss: float = 1.5, *, skipped: bool = False) -> StepReport:
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
    )


def test_metrics_hold_each_step_once_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsHook(path)
    first.on_start(0)
    for step in range(1, 6):
        first.after_step(step, report(step))
    # killed in the middle of a line, with its last checkpoint at step 3
    path.write_text(path.read_text() + '{"step": 6, "lo')
    second = MetricsHook(path)
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
    hook = MetricsHook(tmp_path / "metrics.jsonl")
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
    hook = ConsoleHook(25, 10, Console(file=out, width=200, highlight=False))
    hook.on_start(0)
    for step in range(1, 26):
        hook.after_step(step, report(skipped=step == 3))
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["10/25", "20/25", "25/25"]
    assert all("loss" in line and "left" in line and "skipped 1" in line for line in lines[1:])


def test_a_failed_checkpoint_stops_the_run_only_at_the_end() -> None:
    out, saved = io.StringIO(), []

    def save(step: int) -> None:
        saved.append(step)
        raise CheckpointError("the disk is full")

    hook = SaveHook(save, 2, 5, Console(file=out, width=200))
    for step in range(1, 5):
        hook.after_step(step, report())
    assert saved == [2, 4]
    assert "no checkpoint at step 4" in out.getvalue() and "the disk is full" in out.getvalue()
    with pytest.raises(CheckpointError, match="the disk is full"):
        hook.after_step(5, report())
