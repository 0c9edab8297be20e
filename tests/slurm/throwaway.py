"""The throw-away cluster in tests: jobs, their nodes, and what befalls both."""

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
from aki_megatron.supervise.run_paths import RunPaths, read_lines

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
"""Of the small run."""

PREFLIGHT = "with_preflight.env"
"""A site file beside the one that tests use, which skips the pre-flight to save time."""

LONGEST_SECONDS = 240.0
"""For anything a test waits for; machines may be busy."""

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "PREEMPTED", "OUT_OF_MEMORY")


def wait_for(what: str, condition: Callable[[], Any], explain: Callable[[], str] = str) -> Any:
    """Wait until a condition holds; what it returned."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited in vain for {what}\n{explain()}"
        time.sleep(0.2)
    return found


def variables(process: int) -> dict[str, str]:
    """Environment of a process as it was when it started; empty when it has ended."""
    try:
        words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        return dict(word.decode().partition("=")[::2] for word in words if b"=" in word)
    except OSError:
        return {}


@dataclass
class Cluster:
    """A running cluster in ``folder``."""

    folder: Path
    environment: dict[str, str]

    def run(self, *words: str, ok: bool = True, **environment: str) -> str:
        """A command in the checkout; both its outputs."""
        result = subprocess.run(
            words, cwd=ROOT, env=self.environment | environment, text=True, timeout=LONGEST_SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not ok or result.returncode == 0, f"{words}: {result.returncode}\n{result.stdout}"
        return result.stdout

    def control(self, *words: str) -> str:
        """slurm/cluster.sh."""
        return self.run("slurm/cluster.sh", words[0], str(self.folder), *words[1:])

    def processes(self) -> dict[int, dict[str, str]]:
        """Environment of every process of a job."""
        found = {int(process): variables(int(process)) for process in self.control("processes").split()}
        return {process: seen for process, seen in found.items() if "SLURM_JOB_ID" in seen}

    def strike_node(self, node: str, number: signal.Signals) -> None:
        """Send a signal to everything that runs on a node."""
        struck = {int((self.folder / f"run/slurmd-{node}.pid").read_text())}
        for process, seen in self.processes().items():
            if seen.get("SLURMD_NODENAME") == node:
                struck |= {process}
                # the process that started it, unless that has left; one of them serves each step of a job
                with suppress(OSError, IndexError):
                    parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
                    if Path(f"/proc/{parent}/comm").read_text().strip() == "slurmstepd":
                        struck |= {parent}
        for process in struck:
            with suppress(ProcessLookupError):
                os.kill(process, number)


@dataclass
class Job:
    """A job, or one task of an array, and the run that it trains."""

    cluster: Cluster
    id: str
    run: Path
    output: str
    """Its log, as the option of sbatch names it."""
    orders: Path
    """What paced.py does in the next step."""

    @property
    def folder(self) -> RunPaths:
        return RunPaths(self.run)

    def facts(self) -> dict[str, str]:
        """What Slurm says of it."""
        text = self.cluster.run("scontrol", "show", "job", "--oneliner", self.id)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def log(self) -> str:
        path = Path(self.output.replace("%j", self.id))
        return path.read_text() if path.exists() else f"no log {path}"

    def explain(self) -> str:
        ranks = [f"--- {path}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.logs.glob("*/rank_*.out"))]
        return "\n".join([str(self.facts()), "--- log", self.log(), *ranks[-4:]])

    def order(self, **orders: Any) -> None:
        """Tell paced.py what to do from the next step on."""
        aside = self.orders.with_suffix(".new")
        aside.write_text(json.dumps(orders))
        aside.replace(self.orders)

    def steps(self) -> int:
        """Steps in metrics.jsonl."""
        return len(read_lines(self.folder.metrics))

    def attempts(self) -> list[Attempt]:
        """Attempts so far, whose ranks have met."""
        return [attempt for attempt in read_attempts(self.folder) if attempt.world_size]

    def wait_for_steps(self, attempt: int, steps: int) -> None:
        """Until attempt number ``attempt``, from 0, has done so many steps."""

        def done() -> bool:
            ended, attempts = self._ended(), self.attempts()
            reached = len(attempts) > attempt and self.steps() >= attempts[attempt].from_step + steps
            assert reached or not ended, self.explain()
            return reached

        wait_for(f"{steps} steps of attempt {attempt}", done, self.explain)

    def wait_for_end(self, *states: str) -> dict[str, str]:
        """Until the job has ended; what Slurm says of it. It must have ended in one of the states."""
        facts = wait_for("the end of the job", self._ended, self.explain)
        assert facts["JobState"] in states, self.explain()
        return facts

    def _ended(self) -> dict[str, str] | None:
        facts = self.facts()
        return facts if facts["JobState"] in ENDED else None

    def nodes(self) -> list[str]:
        """Names of its nodes, the first first."""
        return self.cluster.run("scontrol", "show", "hostnames", self.facts()["NodeList"]).split()

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        return int(json.loads(self.folder.process(number).read_text())["pid"])

    def events(self, kind: str) -> list[str]:
        """Texts of the run's events of a kind."""
        return [event["text"] for event in read_events(self.folder) if event["kind"] == kind]

    def left_behind(self) -> list[int]:
        """Processes of the job that outlived it."""
        return [p for p, seen in self.cluster.processes().items() if seen["SLURM_JOB_ID"] == self.facts()["JobId"]]
