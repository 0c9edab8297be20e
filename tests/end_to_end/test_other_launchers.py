"""The deepspeed launcher on a hostfile, and mpirun: both train, and neither's exit code says whether a run is done.

Kill what watches the ranks: deepspeed's train on without it, mpirun's until they next print. docs/cluster.md says so.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers import MPIRUN_ENVIRONMENT, launcher_command
from small_demo import ROOT, TIMEOUT_SECONDS, World

from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.process import Process, is_alive
from aki_megatron.supervise.run_paths import RunPaths, read_metrics

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEPS = 400


def start(world: World, run: str, *launcher: str) -> subprocess.Popen[bytes]:
    """A launcher with a small run, without DeepSpeed's engine, which takes long to start."""
    words = [
        *launcher, str(ROOT / "launcher/sft.py"), *world.sft_flags(run, steps=STEPS), "--init.weights", "null",
        "--parallel.zero_stage", "0", "--model.decoder.num_layers", "1", "--log.tensorboard", "false",
        "--checkpoint.interval", "100", "--train.global_batch_size", "2",
    ]  # fmt: skip
    # into a file: ranks that outlive their launcher would hold a pipe open
    with (world.folder / f"{run}.log").open("a") as log:
        environment = world.environment | MPIRUN_ENVIRONMENT
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def wait_for_steps(folder: RunPaths, more: int) -> None:
    done = len(read_metrics(folder.metrics))
    wait_for(lambda: len(read_metrics(folder.metrics)) >= done + more, f"steps in {folder.path}")


def training(folder: RunPaths) -> list[Process]:
    """The processes of the ranks that live."""
    found = [Process.read(folder.process(rank)) for rank in (0, 1)]
    return [process for process in found if process is not None and is_alive(process)]


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_deepspeed_on_a_hostfile(world: World, tmp_path: Path) -> None:
    """Two machines in name, each with a launcher of its own, as srun can start them: --no_ssh --node_rank."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    folder = RunPaths(world.folder / "hostfile")

    def launch(port: str) -> list[subprocess.Popen[bytes]]:
        where = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
        return [start(world, "hostfile", "deepspeed", *where, "--node_rank", str(node)) for node in (0, 1)]

    nodes = launch("29731")
    wait_for_steps(folder, 3)
    (watching,) = children(nodes[1].pid)
    os.kill(watching, signal.SIGKILL)
    assert nodes[1].wait(TIMEOUT_SECONDS) == 0, "as if all were well"
    wait_for_steps(folder, 3)
    assert len(training(folder)) == 2
    folder.stop.touch()
    wait_for(lambda: not training(folder), "the end of the orphans")
    folder.stop.unlink()
    assert not folder.done.exists()
    assert nodes[0].wait(TIMEOUT_SECONDS) == 0, "a run that was stopped ends so as well"

    assert [node.wait(TIMEOUT_SECONDS) for node in launch("29732")] == [0, 0]
    assert folder.done.exists()
    assert [line["step"] for line in read_metrics(folder.metrics)] == list(range(1, STEPS + 1))


def test_mpirun_killed_and_asked_to_stop(world: World) -> None:
    folder = RunPaths(world.folder / "mpirun_killed")
    launcher = launcher_command("mpirun", 2)
    killed = start(world, "mpirun_killed", *launcher)
    wait_for_steps(folder, 3)
    ranks = training(folder)
    assert len(ranks) == 2
    killed.kill()
    assert killed.wait(TIMEOUT_SECONDS) == -signal.SIGKILL
    wait_for(lambda: folder.first_failure.exists() and not any(map(is_alive, ranks)), "the end of the orphans")
    # a terminal or a pipe without a reader
    assert json.loads(folder.first_failure.read_text())["text"].startswith(("OSError", "BrokenPipeError"))
    assert not folder.process(0).exists() and read_attempts(folder)[0].end == "failed"

    asked = start(world, "mpirun_killed", *launcher)
    wait_for_steps(folder, 3)
    asked.send_signal(signal.SIGUSR1)  # SIGTERM would kill the ranks a second later
    assert asked.wait(TIMEOUT_SECONDS) == 0, "as if all were done"
    assert not folder.done.exists() and len(list(folder.path.glob("STOPPED.*"))) == 1
