"""The temporary Slurm cluster of the tests: jobs, their nodes, and faults injected into both."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.supervise.attempts import Attempt, read_attempts
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
"""Of the small run."""

PREFLIGHT = "with_preflight.env"
"""Site file with the pre-flight check, which the default one of the tests skips to save time."""

WANDB_END_SECONDS = 60.0
TIMEOUT_SECONDS = 240.0
"""Longest wait of a test; machines may be busy."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED", "OUT_OF_MEMORY")


def wait_for(what: str, condition: Callable[[], Any], explain: Callable[[], str] = str) -> Any:
    """Wait until a condition returns a true value; return it."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}\n{explain()}"
        time.sleep(0.2)
    return found


def variables(process: int) -> dict[str, str]:
    """Return the environment a process was started with; empty when it has ended."""
    try:
        entries = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        return dict(entry.decode().partition("=")[::2] for entry in entries if b"=" in entry)
    except OSError:
        return {}


@dataclass
class Cluster:
    """A running cluster in ``folder``."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str, ok: bool = True, **environment: str) -> str:
        """Run a command in the checkout; return stdout and stderr together."""
        result = subprocess.run(
            command, cwd=ROOT, env=self.environment | environment, text=True, timeout=TIMEOUT_SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not ok or result.returncode == 0, f"{command}: {result.returncode}\n{result.stdout}"
        return result.stdout

    def control(self, *command: str) -> str:
        """Run slurm/cluster.sh."""
        return self.run("slurm/cluster.sh", command[0], str(self.folder), *command[1:])

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the environment of every process of a job, by process id."""
        found = {int(process): variables(int(process)) for process in self.control("processes").split()}
        return {process: environment for process, environment in found.items() if "SLURM_JOB_ID" in environment}

    def signal_node(self, node: str, number: signal.Signals) -> None:
        """Send a signal to every process on a node."""
        targets = {int((self.folder / f"run/slurmd-{node}.pid").read_text())}
        for process, environment in self.processes().items():
            if environment.get("SLURMD_NODENAME") == node:
                targets |= {process}
                # its slurmstepd, if that is still there; each step of a job has one
                with suppress(OSError, IndexError):
                    parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
                    if Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd":
                        targets |= {parent}
        for process in targets:
            with suppress(ProcessLookupError):
                os.kill(process, number)


@dataclass
class Job:
    """A job, or one task of an array, and the run that it trains."""

    cluster: Cluster
    id: str
    run: Path
    output: str
    """Path of its log, as the option of sbatch names it."""
    orders: Path
    """What paced.py does in the next step."""

    @property
    def paths(self) -> RunPaths:
        return RunPaths(self.run)

    def info(self) -> dict[str, str]:
        """Return the fields of scontrol show job."""
        text = self.cluster.run("scontrol", "show", "job", "--oneliner", self.id)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def log(self) -> str:
        path = Path(self.output.replace("%j", self.id))
        return path.read_text() if path.exists() else f"no log {path}"

    def explain(self) -> str:
        ranks = [f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(self.paths.logs.glob("*/rank_*.out"))]
        return "\n".join([str(self.info()), "--- log", self.log(), *ranks[-4:]])

    def order(self, **orders: Any) -> None:
        """Tell paced.py what to do from the next step on."""
        temporary = self.orders.with_suffix(".new")
        temporary.write_text(json.dumps(orders))
        temporary.replace(self.orders)

    def steps(self) -> int:
        """Return the number of steps in metrics.jsonl."""
        return len(read_metrics(self.paths.metrics))

    def attempts(self) -> list[Attempt]:
        """Return the attempts whose ranks have joined."""
        return [attempt for attempt in read_attempts(self.paths) if attempt.world_size]

    def wait_for_steps(self, attempt: int, steps: int) -> None:
        """Wait until attempt number ``attempt``, from 0, has done so many steps."""

        def done() -> bool:
            ended, attempts = self._ended(), self.attempts()
            reached = len(attempts) > attempt and self.steps() >= attempts[attempt].from_step + steps
            assert reached or not ended, self.explain()
            return reached

        wait_for(f"{steps} steps of attempt {attempt}", done, self.explain)

    def wait_for_end(self, *states: str) -> dict[str, str]:
        """Wait until the job has ended in one of the states; return its ``info``."""
        info = wait_for("the end of the job", self._ended, self.explain)
        assert info["JobState"] in states, self.explain()
        return info

    def _ended(self) -> dict[str, str] | None:
        info = self.info()
        return info if info["JobState"] in ENDED else None

    def nodes(self) -> list[str]:
        """Return the names of its nodes in order."""
        return self.cluster.run("scontrol", "show", "hostnames", self.info()["NodeList"]).split()

    def rank(self, number: int) -> int:
        """Return the process id of a rank."""
        found = (start.process(number) for start in self.paths.starts())
        return int(json.loads(next(path for path in found if path.exists()).read_text())["pid"])

    def events(self, kind: str) -> list[str]:
        """Return the texts of the run's events of a kind."""
        return [event["text"] for event in read_events(self.paths) if event["kind"] == kind]

    def left_behind(self) -> list[int]:
        """Return the processes of the job that outlive it; wandb's service ends some seconds after a killed rank."""
        job = self.info()["JobId"]
        deadline = time.monotonic() + WANDB_END_SECONDS
        while True:
            left = [process for process, of in self.cluster.processes().items() if of["SLURM_JOB_ID"] == job]
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(0.5)
