"""Jobs that tools/bench/faults.py disturbs: how launchers start them, the signals they get, what is left of them."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from aki_megatron.checkpoint import files
from aki_megatron.errors import CheckpointError
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "launcher/sft.py"
MARK = "AKI_FAULTS_JOB"
"""Variable in the environment of every process of a job, whatever session or parent it has."""

LAUNCHERS = ("torchrun", "deepspeed", "mpirun")

MPIRUN_ENVIRONMENT = {
    # a container's only user is root, and a small machine has fewer cores than a job has ranks
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}

END_SECONDS = 90.0
"""A job of which a process is left this long after a signal that should end it hangs."""


def launch_command(launcher: str, ranks: int) -> list[str]:
    """Return the command that starts a script on ``ranks`` ranks, without the script."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    folder = Path(sys.executable).parent
    return {
        "torchrun": [str(folder / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port],
        "deepspeed": [str(folder / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port],
        "mpirun": ["mpirun", "-np", str(ranks), sys.executable],
    }[launcher]


class Job:
    """A run's ranks and the launcher above them."""

    def __init__(self, launcher: str, ranks: int, flags: Sequence[str], log: Path) -> None:
        self.name, self.num_ranks = launcher, ranks
        self._mark = uuid.uuid4().hex
        environment = os.environ | MPIRUN_ENVIRONMENT | {MARK: self._mark, "OMP_NUM_THREADS": "1"}
        environment |= {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore", "WANDB_SILENT": "true"}
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        command = [*launch_command(launcher, ranks), SCRIPT, *flags]
        self.log = log
        with log.open("w") as output:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def processes(self) -> list[psutil.Process]:
        """Return all live processes of the job: launcher, ranks, the loader's workers, wandb's service."""
        self.launcher.poll()
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # of another user, or ended meanwhile
                continue
        return found

    def ranks(self) -> list[psutil.Process]:
        """Return the processes that train: those that run the script and are not children of one that does."""
        running = {process.pid: process for process in self.processes() if _runs_script(process)}
        return [process for process in running.values() if _parent(process) not in running]

    def wait(self, seconds: float) -> list[psutil.Process]:
        """Wait until no process is left, at most ``seconds``; return those left."""
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def kill(self) -> None:
        """Kill what is left."""
        while left := self.processes():
            send(left, signal.SIGKILL)
            time.sleep(0.05)
        self.launcher.wait()


def _runs_script(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return len(command) > 1 and "python" in Path(command[0]).name and SCRIPT in command[1:3]


def _parent(process: psutil.Process) -> int:
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to processes, some of which may have ended."""
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue


@dataclass(frozen=True)
class Fault:
    """A way to disturb a job."""

    name: str
    strike: Callable[[Job, random.Random], None]
    graceful: bool = False
    """Whether a job that has begun to train must stop in good order: all steps saved, the attempt "stopped"."""
    leaves_ranks: bool = False
    """Whether ranks may train on, as docs/cluster.md says for some launchers, until RUN/STOP ends them."""


def _kill_one_rank(job: Job, generator: random.Random) -> None:
    if ranks := job.ranks():
        send([generator.choice(ranks)], signal.SIGKILL)
    else:
        job.kill()


def _terminate_then_kill(job: Job, generator: random.Random) -> None:
    send(job.processes(), signal.SIGTERM)
    time.sleep(generator.random())
    job.kill()


def _interrupt_group(job: Job, _generator: random.Random) -> None:
    try:
        os.killpg(job.launcher.pid, signal.SIGINT)
    except ProcessLookupError:
        return


FAULTS = (
    Fault("SIGKILL to all", lambda job, _: job.kill()),
    Fault("SIGKILL to a rank", _kill_one_rank),
    Fault("SIGTERM to all", lambda job, _: send(job.processes(), signal.SIGTERM)),
    Fault("SIGTERM to the ranks", lambda job, _: send(job.ranks(), signal.SIGTERM), graceful=True),
    Fault("SIGTERM to the launcher", lambda job, _: job.launcher.terminate(), leaves_ranks=True),
    Fault("SIGKILL to the launcher", lambda job, _: job.launcher.kill(), leaves_ranks=True),
    Fault("SIGTERM, then SIGKILL", _terminate_then_kill),
    Fault("SIGUSR1 to the ranks", lambda job, _: send(job.ranks(), signal.SIGUSR1), graceful=True),
    Fault("Ctrl-C", _interrupt_group, leaves_ranks=True),
)


@dataclass
class RunState:
    """What a run folder holds between two starts."""

    steps: list[int]
    """Step numbers of metrics.jsonl."""
    newest: int
    """Step of the newest complete checkpoint; 0 without one."""
    damaged: list[str] = field(default_factory=list)
    """Checkpoints under their final names that are not what was written."""

    @property
    def gapless(self) -> bool:
        """Whether metrics.jsonl has every step once, up to its last one."""
        return self.steps == list(range(1, len(self.steps) + 1))


def read_state(run: Path) -> RunState:
    """Read a run folder and every file of its checkpoints."""
    paths = RunPaths(run)
    newest = files.latest_checkpoint(paths.checkpoints)
    damaged = []
    for checkpoint in sorted(paths.checkpoints.glob(f"{files.PREFIX}*")):
        try:
            manifest = files.read_manifest(checkpoint)
            files.verify(checkpoint, manifest, manifest)
        except CheckpointError as error:
            damaged.append(f"{checkpoint.name}: {error}")
    steps = [int(line["step"]) for line in read_metrics(paths.metrics)]
    return RunState(steps, 0 if newest is None else files.step_of(newest), damaged)
