"""Kill -9 at ten random moments, resume on 1, 2 and 4 data ranks: the same samples in the same steps."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_demo import ROOT, TIMEOUT_SECONDS, World

from aki_megatron.supervise.run_paths import RunPaths, read_lines
from aki_megatron.train.sample_audit import read_ledger

pytestmark = pytest.mark.end_to_end

KILLS, STEPS = 10, 70


def flags(world: World, run: str) -> list[str]:
    """Packed rows, two phases with other sources; small, and without DeepSpeed, which takes long to start."""
    return [
        "--config", str(ROOT / "configs/demo/sft.yaml"), *world.data_flags(), "--run.dir", str(world.folder / run),
        "--train.steps", str(STEPS), "--optimizer.warmup_steps", "2", "--train.global_batch_size", "4",
        "--train.micro_batch_size", "1", "--checkpoint.interval", "3", "--log.interval", "100", "--log.tensorboard", "false",
        "--init.weights", "null", "--parallel.zero_stage", "0", "--model.decoder.num_layers", "1",
        "--data.packing.enabled", "true", "--data.packing.sequence_length", "192", "--data.packing.buffer_size", "64",
        "--data.phases", f"[{{steps: 30, sources: [vqav2, vsr]}}, {{steps: {STEPS - 30}}}]", "--data.num_workers", "1",
    ]  # fmt: skip


def start(world: World, run: str, ranks: int, port: int) -> list[subprocess.Popen[bytes]]:
    """The ranks, each in a session of its own so that all of it can be killed."""
    made = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        made.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "launcher/sft.py"), *flags(world, run)],
                cwd=ROOT,
                env=world.environment | place,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )  # fmt: skip
        )
    return made


def steps_done(run: Path) -> int:
    return len(read_lines(run / "metrics.jsonl"))


def finish(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 0, errors.decode()[-3000:]


def kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    for process in ranks:
        os.killpg(process.pid, signal.SIGKILL)
    for process in ranks:
        process.communicate()


@pytest.mark.timeout(900)
def test_whatever_kills_a_run_it_consumes_the_same_samples(world: World) -> None:
    draw = random.Random(5)
    finish(start(world, "kill_none", 1, 29640))
    run = world.folder / "kills"
    for number in range(KILLS):
        ranks = start(world, "kills", (1, 2, 4)[number % 3], 29641 + number)
        aim, deadline = steps_done(run) + draw.randint(0, 7), time.monotonic() + TIMEOUT_SECONDS
        while steps_done(run) < min(aim, STEPS - 1) and time.monotonic() < deadline:
            assert all(process.poll() is None for process in ranks), ranks[0].communicate()[1].decode()[-3000:]
            time.sleep(0.01)
        time.sleep(draw.random() * 0.2)  # in the middle of a step, of a checkpoint, of a line
        kill(ranks)
        assert not (run / "DONE").exists()
    finish(start(world, "kills", 2, 29690))
    whole, killed = (read_ledger(world.folder / name) for name in ("kill_none", "kills"))
    assert sorted(whole) == list(range(1, STEPS + 1)) and killed == whole
    losses = [
        [line["loss"] for line in read_lines(RunPaths(world.folder / name).metrics)] for name in ("kill_none", "kills")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
