"""A run that is asked to stop, in every way and again and again, ends as one that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_demo import ROOT, TIMEOUT_SECONDS, World

from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.run_paths import RunPaths, read_metrics
from aki_megatron.train.sample_audit import read_ledger

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEPS, RANKS = 150, 2

Ranks = list[subprocess.Popen[str]]


def start(world: World, run: str, ranks: int, port: int) -> Ranks:
    """The ranks, each with its loader's process in a group of its own; checkpoints only when asked for."""
    flags = [
        "--config", str(ROOT / "configs/demo/sft.yaml"), *world.data_flags(), "--run.dir", str(world.folder / run),
        "--train.steps", str(STEPS), "--optimizer.warmup_steps", "2", "--train.global_batch_size", "4",
        "--train.micro_batch_size", "1", "--checkpoint.interval", "1000", "--log.interval", "100", "--log.tensorboard", "false",
        "--init.weights", "null", "--parallel.zero_stage", "0", "--model.decoder.num_layers", "1", "--data.num_workers", "1",
        "--optimizer.eps", "1e-5",
    ]  # fmt: skip
    made = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        made.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "launcher/sft.py"), *flags],
                cwd=ROOT, env=world.environment | place, start_new_session=True, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    return made


def finish(ranks: Ranks) -> str:
    """What rank 0 printed, once all have ended well and none has complained."""
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


def newest_checkpoint(folder: RunPaths) -> int:
    return int((folder.checkpoints / "latest").read_text().removeprefix("step_"))


def steps_done(folder: RunPaths) -> int:
    return len(read_metrics(folder.metrics))


def stopped(folder: RunPaths) -> dict[str, object]:
    """What the newest STOPPED file says."""
    files = sorted(folder.path.glob("STOPPED.*"), key=lambda path: path.stat().st_mtime)
    return json.loads(files[-1].read_text())


@pytest.fixture(scope="module")
def undisturbed(world: World) -> Path:
    finish(start(world, "stop_none", 1, 29720))
    return world.folder / "stop_none"


def test_stops_leave_no_trace_in_the_run(world: World, undisturbed: Path) -> None:
    folder = RunPaths(world.folder / "stopped")

    # SIGUSR1 to one rank, while it starts: held until the first step is done
    ranks = start(world, "stopped", RANKS, 29721)
    wait_until(folder.log(1).exists, ranks)
    ranks[1].send_signal(signal.SIGUSR1)
    assert "stopped after step 1 (another rank was asked to stop)" in finish(ranks)
    assert stopped(folder) == {"step": 1, "reason": "another rank was asked to stop"}
    assert newest_checkpoint(folder) == 1 and not folder.done.exists()

    # SAVE, then STOP
    folder.save.touch()
    ranks = start(world, "stopped", RANKS, 29722)
    wait_until(lambda: not folder.save.exists(), ranks)
    assert newest_checkpoint(folder) == 2
    folder.stop.touch()
    printed = finish(ranks)
    assert "resuming after step 1" in printed and "(STOP exists)" in printed
    second = steps_done(folder)
    assert stopped(folder) == {"step": second, "reason": "STOP exists"} and newest_checkpoint(folder) == second < STEPS

    # STOP stays: nothing starts
    assert "remove the file to go on" in finish(start(world, "stopped", RANKS, 29723))
    assert steps_done(folder) == second

    # SIGTERM to every process of every rank, as a scheduler sends it
    folder.stop.unlink()
    ranks = start(world, "stopped", RANKS, 29724)
    wait_until(lambda: steps_done(folder) > second, ranks)
    for process in ranks:
        os.killpg(process.pid, signal.SIGTERM)
    finish(ranks)
    third = steps_done(folder)
    assert stopped(folder) == {"step": third, "reason": "SIGTERM"} and second < third < STEPS

    assert "done after 150 steps" in finish(start(world, "stopped", 1, 29725))
    attempts = read_attempts(folder)
    assert [attempt.end for attempt in attempts] == ["stopped"] * 3 + ["done"]
    assert [attempt.step for attempt in attempts] == [1, second, third, STEPS]
    assert [attempt.from_step for attempt in attempts] == [0, 1, second, third]
    assert [attempt.world_size for attempt in attempts] == [RANKS] * 3 + [1]
    assert [event["kind"] for event in read_events(folder)] == ["stop", "save", "stop", "stop"]
    assert read_ledger(folder.path) == read_ledger(undisturbed)
    again, before = read_metrics(folder.metrics), read_metrics(RunPaths(undisturbed).metrics)
    assert [line["step"] for line in again] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in again] == pytest.approx([line["loss"] for line in before], rel=1e-4)
