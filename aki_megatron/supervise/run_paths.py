"""The run folder: where each file of a run lives, and its metrics as one line per optimizer step.

config.yaml  metrics.jsonl  ledger/replica_0.jsonl  checkpoints/step_000100/  logs/rank_0.log  report.html  DONE
attempts.jsonl  events.jsonl  heartbeat/rank_0.json  STOPPED.<attempt>, and from a person's hand STOP and SAVE
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # tools that look at a run need no torch
    from aki_megatron.types import StepReport


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step."""
        return self.path / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """Folder of what each data rank consumed, step by step (train/sample_audit.py)."""
        return self.path / "ledger"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoint folders."""
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        """A page for a person."""
        return self.path / "report.html"

    @property
    def done(self) -> Path:
        """Exists once the last step is saved."""
        return self.path / "DONE"

    @property
    def stop(self) -> Path:
        """Made by a person: the run stops after the next step, and does not start while this is there."""
        return self.path / "STOP"

    @property
    def save(self) -> Path:
        """Made by a person: a checkpoint after the next step; it goes when that is written."""
        return self.path / "SAVE"

    def stopped(self, attempt: str) -> Path:
        """Where and why an attempt stopped in an orderly way, to be started again."""
        return self.path / f"STOPPED.{attempt}"

    @property
    def attempts(self) -> Path:
        """One line when an attempt starts and one when it ends (supervise/attempts.py)."""
        return self.path / "attempts.jsonl"

    @property
    def events(self) -> Path:
        """Spikes, rollbacks, hangs, checkpoints that failed, ... (supervise/events.py)."""
        return self.path / "events.jsonl"

    @property
    def heartbeats(self) -> Path:
        """Folder of a file per rank, written anew every few seconds."""
        return self.path / "heartbeat"

    def heartbeat(self, rank: int) -> Path:
        """Where a rank stands (supervise/heartbeat.py)."""
        return self.heartbeats / f"rank_{rank}.json"

    @property
    def hang(self) -> Path:
        """Exists once a rank of this attempt has noticed a hang: all ranks write their stacks (supervise/watchdog.py)."""
        return self.heartbeats / "hang"

    def hang_stacks(self, rank: int) -> Path:
        """Stacks of a rank when a hang was noticed."""
        return self.logs / f"hang_rank_{rank}.txt"

    @property
    def logs(self) -> Path:
        """What each rank leaves for a person, and for the other ranks when it fails."""
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        """Log of one rank."""
        return self.logs / f"rank_{rank}.log"

    def process(self, rank: int) -> Path:
        """Exists while the process of a rank runs; stays behind when it was killed (supervise/failure.py)."""
        return self.logs / f"rank_{rank}.process"

    @property
    def first_failure(self) -> Path:
        """Which rank ended the last attempt, and why; only after a failure."""
        return self.logs / "first_failure.json"


def metrics_line(step: int, report: StepReport) -> dict[str, Any]:
    """The metrics of one step: its number, the fields of the report, tokens_per_second.

    Loss and norm are None where they are not finite (a skipped step): JSON has no such numbers.
    """
    facts = asdict(report)
    del facts["wish"]
    line = {"step": step} | facts | {"tokens_per_second": report.tokens / max(report.seconds, 1e-9)}
    return {name: value if math.isfinite(value) else None for name, value in line.items()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a file of JSON lines; a last line cut by a crash is left out. No file is an empty one."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    # What follows the last newline was never finished: a crash in the middle of a write.
    return [json.loads(line) for line in lines[:-1] if line]


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append to a short file of JSON lines, in one write; a last line that a crash has cut goes first."""
    if path.exists():
        content = path.read_bytes()
        if (whole := content.rfind(b"\n") + 1) != len(content):
            os.truncate(path, whole)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, as metrics_line made them."""
    return read_lines(path)


def rewind_lines(path: Path, step: int) -> None:
    """Drop the lines after ``step``: those steps are done again from the checkpoint, and each may appear once."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(aside, path)
