"""The deepspeed launcher on a hostfile, and mpirun: both train, and the exit code does not show whether a run is done.

When the process that started the ranks is killed, they train on (docs/cluster.md).
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from launchers import MPIRUN_ENVIRONMENT, launcher_command
from small_demo import ROOT, TIMEOUT_SECONDS, DemoWorkspace

from aki_megatron.supervise.attempts import read_attempts
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.process import RankProcess, is_alive
from aki_megatron.supervise.run_paths import RunPaths

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

STEPS = 400


def start(demo: DemoWorkspace, run: str, *launcher: str) -> subprocess.Popen[bytes]:
    """A launcher with a small run, without DeepSpeed's engine, which takes long to start."""
    command = [
        *launcher, str(ROOT / "launcher/sft.py"), *demo.sft_flags(run, steps=STEPS), "--init.weights", "null",
        "--parallel.zero_stage", "0", "--model.decoder.num_layers", "1", "--log.tensorboard", "false",
        "--checkpoint.interval", "100", "--train.global_batch_size", "2",
    ]  # fmt: skip
    # into a file: ranks that outlive their launcher would hold a pipe open
    with (demo.folder / f"{run}.log").open("a") as log:
        environment = demo.environment | MPIRUN_ENVIRONMENT
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.02)


def wait_for_steps(paths: RunPaths, more: int) -> None:
    done = len(read_metrics(paths.metrics))
    wait_for(lambda: len(read_metrics(paths.metrics)) >= done + more, f"steps in {paths.path}")


def training(paths: RunPaths) -> list[RankProcess]:
    """Return the processes of the live ranks."""
    found = [RankProcess.read(start.process(rank)) for start in paths.starts() for rank in (0, 1)]
    return [process for process in found if process is not None and is_alive(process)]


def children(parent: int) -> list[int]:
    """Processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_deepspeed_on_a_hostfile(demo: DemoWorkspace, tmp_path: Path) -> None:
    """Two simulated machines, each with a launcher of its own, as srun can start them: --no_ssh --node_rank."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    paths = RunPaths(demo.folder / "hostfile")

    def launch(port: str) -> list[subprocess.Popen[bytes]]:
        where = ["--hostfile", str(hostfile), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", port]
        return [start(demo, "hostfile", "deepspeed", *where, "--node_rank", str(node)) for node in (0, 1)]

    nodes = launch("29731")
    wait_for_steps(paths, 3)
    (watching,) = children(nodes[1].pid)
    os.kill(watching, signal.SIGKILL)
    assert nodes[1].wait(TIMEOUT_SECONDS) == 0, "as if all were well"
    wait_for_steps(paths, 3)
    assert len(training(paths)) == 2
    paths.stop.touch()
    wait_for(lambda: not training(paths), "the end of the orphans")
    paths.stop.unlink()
    assert not paths.done.exists()
    assert nodes[0].wait(TIMEOUT_SECONDS) == 0, "a run that was stopped ends so as well"

    assert [node.wait(TIMEOUT_SECONDS) for node in launch("29732")] == [0, 0]
    assert paths.done.exists()
    assert [line["step"] for line in read_metrics(paths.metrics)] == list(range(1, STEPS + 1))


def test_mpirun_killed_and_asked_to_stop(demo: DemoWorkspace) -> None:
    paths = RunPaths(demo.folder / "mpirun_killed")
    launcher = launcher_command("mpirun", 2)
    killed = start(demo, "mpirun_killed", *launcher)
    wait_for_steps(paths, 3)
    ranks = training(paths)
    assert len(ranks) == 2
    killed.kill()
    assert killed.wait(TIMEOUT_SECONDS) == -signal.SIGKILL
    wait_for_steps(paths, 3)  # nobody reads what the ranks print any more
    assert len(training(paths)) == 2
    paths.stop.touch()
    wait_for(lambda: not any(map(is_alive, ranks)), "the end of the orphans")
    paths.stop.unlink()
    assert not training(paths) and read_attempts(paths)[0].end == "stopped"

    asked = start(demo, "mpirun_killed", *launcher)
    wait_for_steps(paths, 3)
    asked.send_signal(signal.SIGUSR1)  # SIGTERM would kill the ranks a second later
    assert asked.wait(TIMEOUT_SECONDS) == 0, "as if all were done"
    assert not paths.done.exists() and len(list(paths.path.glob("STOPPED.*"))) == 2
