"""tools/status.py on folders in every state a run can be in."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from aki_megatron.supervise.attempts import begin_attempt, end_attempt
from aki_megatron.supervise.events import record
from aki_megatron.supervise.heartbeat import Heartbeat
from aki_megatron.supervise.run_paths import RunPaths, append_line
from tools.status import TAIL_BYTES, lines, main, read_tail, stands, state_of

STEPS = 1000


@pytest.fixture
def folder(tmp_path: Path) -> RunPaths:
    """A run of two ranks at step 250, its second attempt under way."""
    made = RunPaths(tmp_path / "run")
    made.logs.mkdir(parents=True)
    made.heartbeats.mkdir()
    made.config.write_text(f"train:\n  steps: {STEPS}\n")
    for step in range(1, 251):
        add_metrics(made, step)
    begin_attempt(made, "7.0", from_step=0, world_size=2, hosts=["gpu01", "gpu02"])
    end_attempt(made, "7.0", step=200, end="stopped", reason="SIGUSR1")
    begin_attempt(made, "7.1", from_step=200, world_size=2, hosts=["gpu01", "gpu02"])
    for rank in (0, 1):
        beat(made, rank)
    return made


def add_metrics(folder: RunPaths, step: int, **changes: Any) -> None:
    line = {"step": step, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-4, "seconds": 1.0, "skipped": False}
    with folder.metrics.open("a") as file:
        file.write(json.dumps(line | {"tokens_per_second": 5000.0} | changes) + "\n")


def beat(folder: RunPaths, rank: int, *, age: float = 0.0, stays: float = 1.0, step: int = 250) -> None:
    now = time.time() - age
    Heartbeat(rank, step, "forward 2", now - stays, step_seconds=2.0, time=now, host=f"gpu0{rank + 1}").write(
        folder.heartbeat(rank)
    )


def shown(folder: RunPaths) -> str:
    return "\n".join(f"{name:10}{text}" for name, text in lines(stands(folder.path, time.time())))


def state(folder: RunPaths) -> str:
    return state_of(stands(folder.path, time.time()))[0]


def test_a_run_that_goes_well(folder: RunPaths) -> None:
    (folder.checkpoints / "step_000200").mkdir(parents=True)
    (folder.checkpoints / "step_000200/manifest.json").write_text("{}")
    record(folder, 120, "spike", "the loss is high")
    add_metrics(folder, 251, loss=None, skipped=True)
    text = shown(folder)
    assert state(folder) == "running" and "running (2 of 2 ranks live)" in text
    assert "251 of 1,000 (25.1%)" in text
    assert "0:24:58 at 2.00 s a step" in text, "749 steps of 2 s: the heartbeat's, which counts data and callbacks too"
    assert "loss not finite  norm 1.0000  lr 1.00e-04  5,000 tokens/s  skipped 1 of the last 50 steps" in text
    assert "step_000200" in text and "2, so 1 restart" in text
    assert "from step 0 on 2 ranks of 2 machines; stopped after step 200: SIGUSR1" in text
    assert "step 120, spike: the loss is high" in text
    assert "lags" not in text and "silent" not in text and "error" not in text


def test_the_rank_that_lags_is_named(folder: RunPaths) -> None:
    beat(folder, 1, stays=90, step=249)
    assert "lags      rank 1 on gpu02: in 'forward 2' for 0:01:3" in shown(folder)


def test_a_silent_rank_is_named_and_a_silent_run_too(folder: RunPaths) -> None:
    beat(folder, 1, age=100)
    assert "silent    rank 1; rank 1 on gpu02 was last heard of 0:01:4" in shown(folder)
    assert state(folder) == "running"
    append_line(folder.attempts, {"attempt": "7.2", "time": time.time() - 200, "from_step": 200})
    beat(folder, 0, age=100)
    assert state(folder) == "silent" and "killed, or its machines are gone" in shown(folder)
    assert shown(folder).count("; ended without a word") == 2, "7.1 and 7.2"


def test_what_ended_a_run_is_told(folder: RunPaths) -> None:
    folder.first_failure.write_text(json.dumps({"rank": 1, "text": "OSError: disk\ngone", "time": time.time() + 1}))
    assert state(folder) == "failed" and "rank 1: OSError: disk\ngone" in shown(folder)
    folder.first_failure.unlink()
    end_attempt(folder, "7.1", step=240, end="stopped", reason="STOP exists")
    folder.stop.touch()
    assert state(folder) == "stopped" and "it is not started again" in shown(folder)
    begin_attempt(folder, "7.2", from_step=240)
    end_attempt(folder, "7.2", step=None, end="failed", reason="KeyError: 'x'")
    assert state(folder) == "failed" and "failed: KeyError: 'x'" in shown(folder)
    folder.done.touch()
    assert state(folder) == "done" and "left" not in shown(folder)


def test_a_run_that_has_only_just_begun(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path)
    begin_attempt(folder, "7.0", from_step=0)
    assert state(folder) == "starting" and "attempt 7.0 began 0:00:00 ago" in shown(folder)
    folder.attempts.unlink()
    folder.config.write_text("train: {steps: 3}\n")
    assert state(folder) == "not started" and "0 of 3 (0.0%)" in shown(folder)


def test_only_the_end_of_long_metrics_is_read(folder: RunPaths) -> None:
    for step in range(251, 1500):
        add_metrics(folder, step)
    with folder.metrics.open("a") as file:
        file.write('{"step": 1500, "lo')
    found = read_tail(folder.metrics)
    assert folder.metrics.stat().st_size > 2 * TAIL_BYTES
    assert [line["step"] for line in found] == list(range(1500 - len(found), 1500)) and 200 < len(found) < 1000


def test_the_command(folder: RunPaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.done.touch()
    assert main([str(folder.path), "--watch", "0.1"]) == 0, "a run that is done is not watched"
    assert capsys.readouterr().out.splitlines()[1] == "state     done"
    assert main([str(tmp_path / "elsewhere")]) == 2
    assert "elsewhere is no run folder" in capsys.readouterr().err
