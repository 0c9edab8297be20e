"""Kill -9 at ten random moments, resume on 1, 2 and 4 data ranks: the same samples in the same steps."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_demo import ROOT, TIMEOUT_SECONDS, DemoWorkspace

from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.sample_audit import read_sample_audit

pytestmark = pytest.mark.end_to_end

KILLS, STEPS = 10, 70


def flags(demo: DemoWorkspace, run: str) -> list[str]:
    """Return flags of a small run: packed sequences, two phases with different sources, no DeepSpeed."""
    return [
        "--config", str(ROOT / "configs/demo/sft.yaml"), *demo.data_flags(), "--run.dir", str(demo.folder / run),
        "--train.steps", str(STEPS), "--optimizer.warmup_steps", "2", "--train.global_batch_size", "4",
        "--train.micro_batch_size", "1", "--checkpoint.interval", "3",
        "--log.interval", "100", "--log.tensorboard", "false",
        "--init.weights", "null", "--parallel.zero_stage", "0", "--model.decoder.num_layers", "1",
        "--data.packing.enabled", "true", "--data.packing.sequence_length", "192", "--data.packing.buffer_size", "64",
        "--data.phases", f"[{{steps: 30, sources: [vqav2, vsr]}}, {{steps: {STEPS - 30}}}]", "--data.num_workers", "1",
    ]  # fmt: skip


def start(demo: DemoWorkspace, run: str, ranks: int, port: int) -> list[subprocess.Popen[bytes]]:
    """The ranks, each in a session of its own so that all of it can be killed."""
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "launcher/sft.py"), *flags(demo, run)],
                cwd=ROOT,
                env=demo.environment | environment,
                start_new_session=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )  # fmt: skip
        )
    return processes


def steps_done(run: Path) -> int:
    return len(read_metrics(run / "metrics.jsonl"))


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
def test_a_killed_run_trains_on_the_same_samples(demo: DemoWorkspace) -> None:
    generator = random.Random(5)
    finish(start(demo, "kill_none", 1, 29640))
    run = demo.folder / "kills"
    for number in range(KILLS):
        ranks = start(demo, "kills", (1, 2, 4)[number % 3], 29641 + number)
        target, deadline = steps_done(run) + generator.randint(0, 7), time.monotonic() + TIMEOUT_SECONDS
        while steps_done(run) < min(target, STEPS - 1) and time.monotonic() < deadline:
            assert all(process.poll() is None for process in ranks), ranks[0].communicate()[1].decode()[-3000:]
            time.sleep(0.01)
        time.sleep(generator.random() * 0.2)  # in the middle of a step, of a checkpoint, of a line
        kill(ranks)
        assert not (run / "DONE").exists()
    finish(start(demo, "kills", 2, 29690))
    uninterrupted, killed = (read_sample_audit(demo.folder / name) for name in ("kill_none", "kills"))
    assert sorted(uninterrupted) == list(range(1, STEPS + 1)) and killed == uninterrupted
    losses = [
        [line["loss"] for line in read_metrics(RunPaths(demo.folder / name).metrics)] for name in ("kill_none", "kills")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
