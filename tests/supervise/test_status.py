"""The status of run folders in every state a run can be in."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from aki_megatron.supervise.attempts import record_end, record_start
from aki_megatron.supervise.events import record_event
from aki_megatron.supervise.first_failure import FirstFailure
from aki_megatron.supervise.heartbeat import Heartbeat
from aki_megatron.supervise.jsonl import append_line
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.status import TAIL_BYTES, format_status, read_status, read_tail, state_of
from tools.status import main

STEPS = 1000


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A run of two ranks at step 250, in its second attempt."""
    paths = RunPaths(tmp_path / "run")
    paths.logs.mkdir(parents=True)
    paths.heartbeats.mkdir()
    paths.config.write_text(f"train:\n  steps: {STEPS}\n")
    for step in range(1, 251):
        add_metrics(paths, step)
    record_start(paths, "7.0", from_step=0, world_size=2, hosts=["gpu01", "gpu02"])
    record_end(paths, "7.0", step=200, end="stopped", reason="SIGUSR1")
    record_start(paths, "7.1", from_step=200, world_size=2, hosts=["gpu01", "gpu02"])
    for rank in (0, 1):
        beat(paths, rank)
    return paths


def add_metrics(paths: RunPaths, step: int, **changes: Any) -> None:
    line = {"step": step, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-4, "seconds": 1.0, "skipped": False}
    with paths.metrics.open("a") as file:
        file.write(json.dumps(line | {"tokens_per_second": 5000.0} | changes) + "\n")


def beat(paths: RunPaths, rank: int, *, age: float = 0.0, seconds_in_phase: float = 1.0, step: int = 250) -> None:
    now = time.time() - age
    Heartbeat(
        rank, step, "forward 2", now - seconds_in_phase, step_seconds=2.0, time=now, host=f"gpu0{rank + 1}"
    ).write(paths.heartbeat(rank))


def shown(paths: RunPaths) -> str:
    return "\n".join(f"{name:13}{text}" for name, text in format_status(read_status(paths.path, time.time())))


def state(paths: RunPaths) -> str:
    return state_of(read_status(paths.path, time.time()))[0]


def test_a_run_that_goes_well(paths: RunPaths) -> None:
    (paths.checkpoints / "step_000200").mkdir(parents=True)
    (paths.checkpoints / "step_000200/manifest.json").write_text("{}")
    record_event(paths, 120, "loss_spike", "the loss is high")
    add_metrics(paths, 251, loss=None, skipped=True)
    text = shown(paths)
    assert state(paths) == "running" and "running (2 of 2 ranks alive)" in text
    assert "251 of 1,000 (25.1%)" in text
    assert "0:24:58 at 2.00 s per step" in text, "749 steps of 2 s, data and callbacks included"
    assert "loss not finite  norm 1.0000  lr 1.00e-04  5,000 tokens/s  skipped 1 of the last 50 steps" in text
    assert "step_000200" in text and "attempts     2 (1 restart)" in text
    assert "from step 0 on 2 ranks of 2 machines; stopped after step 200: SIGUSR1" in text
    assert "step 120, loss_spike: the loss is high" in text
    assert "straggler" not in text and "unresponsive" not in text and "error" not in text


def test_the_last_validation_and_the_best_checkpoint_are_shown(paths: RunPaths) -> None:
    assert "validation  " not in shown(paths) and "best  " not in shown(paths)
    source = {"loss": 1.25, "supervised_tokens": 3, "samples": 2}
    for step, loss, accuracy in ((100, 1.25, None), (200, None, 50.0)):
        line = {"step": step, "loss": loss, "accuracy": accuracy, "sources": {"vsr": source}}
        append_line(paths.validation, line)
    append_line(paths.validation, {"step": 201, "loss": 1.0, "accuracy": None, "sources": [1]})  # damaged
    (paths.checkpoints / "step_000100").mkdir(parents=True)
    (paths.checkpoints / "step_000100/manifest.json").write_text("{}")
    (paths.checkpoints / "best").write_text("step_000100\n")
    text = shown(paths)
    assert "validation   step 200: loss not finite (vsr 1.2500)  accuracy 50.0 %" in text
    assert "best         step_000100 (validation loss 1.2500)" in text
    paths.validation.unlink()
    assert "best         step_000100\n" in shown(paths)


def test_the_straggler_is_named(paths: RunPaths) -> None:
    beat(paths, 1, seconds_in_phase=90, step=249)
    assert "straggler    rank 1 on gpu02: in 'forward 2' for 0:01:3" in shown(paths)


def test_an_unresponsive_rank_is_named_and_an_unresponsive_run_too(paths: RunPaths) -> None:
    beat(paths, 1, age=100)
    assert "unresponsive rank 1; last heartbeat of rank 1 on gpu02 0:01:4" in shown(paths)
    assert state(paths) == "running"
    append_line(paths.attempts, {"attempt": "7.2", "time": time.time() - 200, "from_step": 200})
    beat(paths, 0, age=100)
    assert state(paths) == "unresponsive" and "killed, or its machines are down" in shown(paths)
    assert shown(paths).count("; ended without an error message") == 2, "7.1 and 7.2"


def test_the_cause_of_the_end_is_shown(paths: RunPaths) -> None:
    files = paths.start("a")
    files.path.mkdir(parents=True)
    FirstFailure(1, "OSError: disk\ngone", 1, 1, time.time() + 1).write_once(files.first_failure)
    assert state(paths) == "failed" and "rank 1: OSError: disk\ngone" in shown(paths)
    files.first_failure.unlink()
    record_end(paths, "7.1", step=240, end="stopped", reason="STOP exists")
    paths.stop.touch()
    assert state(paths) == "stopped" and "the run is not started again" in shown(paths)
    record_start(paths, "7.2", from_step=240)
    record_end(paths, "7.2", step=None, end="failed", reason="KeyError: 'x'")
    assert state(paths) == "failed" and "failed: KeyError: 'x'" in shown(paths)
    paths.done.touch()
    assert state(paths) == "done" and "time left" not in shown(paths)


def test_a_run_that_has_only_just_begun(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    record_start(paths, "7.0", from_step=0)
    assert state(paths) == "starting" and "attempt 7.0 began 0:00:00 ago" in shown(paths)
    paths.attempts.unlink()
    paths.config.write_text("train: {steps: 3}\n")
    assert state(paths) == "not started" and "0 of 3 (0.0%)" in shown(paths)


def test_only_the_end_of_long_metrics_is_read(paths: RunPaths) -> None:
    for step in range(251, 1500):
        add_metrics(paths, step)
    with paths.metrics.open("a") as file:
        file.write('{"step": 1500, "lo')
    found = read_tail(paths.metrics)
    assert paths.metrics.stat().st_size > 2 * TAIL_BYTES
    assert [line["step"] for line in found] == list(range(1500 - len(found), 1500)) and 200 < len(found) < 1000


def test_the_command(paths: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths.done.touch()
    assert main([str(paths.path), "--watch", "0.1"]) == 0, "a run that is done is not watched"
    assert capsys.readouterr().out.splitlines()[1] == "state        done"
    assert main([str(tmp_path / "elsewhere")]) == 2
    assert "elsewhere is not a run folder" in capsys.readouterr().err


def test_damaged_files_are_left_out(paths: RunPaths) -> None:
    record_event(paths, 250, "stop", "STOP exists")
    files = paths.start("a")
    files.path.mkdir()
    for path in (paths.metrics, paths.events, paths.attempts, files.first_failure, paths.heartbeat(1)):
        with path.open("ab") as file:
            file.write(b'{"step": 1}\n\xff\n[]\n{"attempt": 3, "time": ""}\n')
    files.first_failure.write_text('{"rank": 0, "text": "x", "code": 1, "reported_by": 0, "time": "now"}')
    (paths.checkpoints / "step_000200").mkdir(parents=True)
    (paths.checkpoints / "latest").write_bytes(b"\xff")
    text = shown(paths)
    assert "step         250 of 1,000" in text and "attempts     2 (1 restart)" in text and "STOP exists" in text
    assert "1 of 1 ranks alive" in text


@pytest.mark.parametrize("content", [b"", b"\xff", b"train: 3\n", b"a: [\n", b"[" * 5000])
def test_a_damaged_config_is_named(paths: RunPaths, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    paths.config.write_bytes(content)
    assert main([str(paths.path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {paths.config} is damaged (") and message.count("\n") == 1
