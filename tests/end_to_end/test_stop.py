"""A run that is stopped repeatedly, in every way, ends as an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_demo import ROOT, TIMEOUT_SECONDS, DemoWorkspace

from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.sample_audit import read_sample_audit

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEPS, RANKS = 150, 2

Ranks = list[subprocess.Popen[str]]


def start(demo: DemoWorkspace, run: str, ranks: int, port: int) -> Ranks:
    """The ranks, each with its loader's process in a group of its own; checkpoints only when asked for."""
    flags = [
        "--config", str(ROOT / "configs/demo/sft.yaml"), *demo.data_flags(), "--run.dir", str(demo.folder / run),
        "--train.steps", str(STEPS), "--optimizer.warmup_steps", "2", "--train.global_batch_size", "4",
        "--train.micro_batch_size", "1", "--checkpoint.interval", "1000",
        "--log.interval", "100", "--log.tensorboard", "false", "--data.num_workers", "1",
        "--init.weights", "null", "--parallel.zero_stage", "0", "--model.decoder.num_layers", "1",
        "--optimizer.eps", "1e-5",
    ]  # fmt: skip
    processes = []
    for rank in range(ranks):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "launcher/sft.py"), *flags],
                cwd=ROOT, env=demo.environment | variables, start_new_session=True, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return processes


def finish(ranks: Ranks) -> str:
    """Return what rank 0 printed, once all have ended well and without an error."""
    printed = []
    for process in ranks:
        out, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 0 and "error" not in errors, errors[-3000:]
        printed.append(out)
    return printed[0]


def wait_until(true: Callable[[], bool], ranks: Ranks) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not true():
        assert all(process.poll() is None for process in ranks) and time.monotonic() < end, "ended, or never began"
        time.sleep(0.02)


def newest_checkpoint(paths: RunPaths) -> int:
    return int((paths.checkpoints / "latest").read_text().removeprefix("step_"))


def steps_done(paths: RunPaths) -> int:
    return len(read_metrics(paths.metrics))


def stopped(paths: RunPaths) -> dict[str, object]:
    """Return the content of the newest STOPPED file."""
    files = sorted(paths.path.glob("STOPPED.*"), key=lambda path: path.stat().st_mtime)
    return json.loads(files[-1].read_text())


@pytest.fixture(scope="module")
def uninterrupted(demo: DemoWorkspace) -> Path:
    finish(start(demo, "stop_none", 1, 29720))
    return demo.folder / "stop_none"


def test_stops_do_not_change_the_result(demo: DemoWorkspace, uninterrupted: Path) -> None:
    paths = RunPaths(demo.folder / "stopped")

    # SIGUSR1 to one rank, while it starts: held until the first step is done
    ranks = start(demo, "stopped", RANKS, 29721)
    wait_until(paths.log(1).exists, ranks)
    ranks[1].send_signal(signal.SIGUSR1)
    assert "stopped after step 1 (another rank was asked to stop)" in finish(ranks)
    assert stopped(paths) == {"step": 1, "reason": "another rank was asked to stop"}
    assert newest_checkpoint(paths) == 1 and not paths.done.exists()

    # SAVE, then STOP
    paths.save.touch()
    ranks = start(demo, "stopped", RANKS, 29722)
    wait_until(lambda: not paths.save.exists(), ranks)
    assert newest_checkpoint(paths) == 2
    paths.stop.touch()
    printed = finish(ranks)
    assert "resuming after step 1" in printed and "(STOP exists)" in printed
    second = steps_done(paths)
    assert stopped(paths) == {"step": second, "reason": "STOP exists"} and newest_checkpoint(paths) == second < STEPS

    # STOP stays: nothing starts
    assert "remove the file to resume" in finish(start(demo, "stopped", RANKS, 29723))
    assert steps_done(paths) == second

    # SIGTERM to every process of every rank, as a scheduler sends it
    paths.stop.unlink()
    ranks = start(demo, "stopped", RANKS, 29724)
    wait_until(lambda: steps_done(paths) > second, ranks)
    for process in ranks:
        os.killpg(process.pid, signal.SIGTERM)
    finish(ranks)
    third = steps_done(paths)
    assert stopped(paths) == {"step": third, "reason": "SIGTERM"} and second < third < STEPS

    assert "done after 150 steps" in finish(start(demo, "stopped", 1, 29725))
    attempts = read_attempts(paths)
    assert [attempt.end for attempt in attempts] == ["stopped"] * 3 + ["done"]
    assert [attempt.step for attempt in attempts] == [1, second, third, STEPS]
    assert [attempt.from_step for attempt in attempts] == [0, 1, second, third]
    assert [attempt.world_size for attempt in attempts] == [RANKS] * 3 + [1]
    assert [event["kind"] for event in read_events(paths)] == ["stop", "save", "stop", "stop"]
    assert read_sample_audit(paths.path) == read_sample_audit(uninterrupted)
    resumed, expected = read_metrics(paths.metrics), read_metrics(RunPaths(uninterrupted).metrics)
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in expected], rel=1e-4)
