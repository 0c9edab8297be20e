"""Where each file of a run is: the layout of a run folder.

config.yaml  metrics.jsonl  validation.jsonl  sample_audit/replica_0.jsonl  checkpoints/step_000100/  logs/rank_0.log
evaluations/step_000100/  report.html  DONE  attempts.jsonl  events.jsonl  heartbeat/rank_0.json  STOPPED.<attempt>
RUNNING  SAVED, and, created by the user, STOP and SAVE
"""

from dataclasses import dataclass
from pathlib import Path

START_PREFIX = "start_"
"""Of the names of folders of StartPaths."""


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run; ``path`` is its folder (run.dir)."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per optimizer step (supervise/metrics.py)."""
        return self.path / "metrics.jsonl"

    @property
    def validation(self) -> Path:
        """One JSON object per validation (supervise/validations.py)."""
        return self.path / "validation.jsonl"

    @property
    def evaluations(self) -> Path:
        """Folder of the evaluations of checkpoints by other jobs (supervise/evaluations.py)."""
        return self.path / "evaluations"

    @property
    def sample_audit(self) -> Path:
        """Folder of the hashes of the samples each data rank trained on, step by step (train/sample_audit.py)."""
        return self.path / "sample_audit"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoint folders."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """HTML page with curves and the configuration."""
        return self.path / "report.html"

    @property
    def done(self) -> Path:
        """Exists once the last step is saved: the only sign of success."""
        return self.path / "DONE"

    @property
    def stop(self) -> Path:
        """Created by the user: the run stops after the next step and does not start while this file exists."""
        return self.path / "STOP"

    @property
    def save(self) -> Path:
        """Created by the user: a checkpoint is saved after the next step, then this file is removed."""
        return self.path / "SAVE"

    @property
    def running(self) -> Path:
        """Names the process that trains here; exists while it does (supervise/run_lock.py)."""
        return self.path / "RUNNING"

    @property
    def saved(self) -> Path:
        """Step of the last checkpoint that was completed; outlives the folder of checkpoints (train/history.py)."""
        return self.path / "SAVED"

    def stopped(self, attempt: str) -> Path:
        """Where and why an attempt stopped in an orderly way, to be resumed."""
        return self.path / f"STOPPED.{attempt}"

    @property
    def attempts(self) -> Path:
        """One line when an attempt starts and one when it ends (supervise/attempts.py)."""
        return self.path / "attempts.jsonl"

    @property
    def events(self) -> Path:
        """Loss spikes, rollbacks, hangs, failed checkpoints, ... (supervise/events.py)."""
        return self.path / "events.jsonl"

    @property
    def heartbeats(self) -> Path:
        """Folder of a file per rank, rewritten every few seconds."""
        return self.path / "heartbeat"

    def heartbeat(self, rank: int) -> Path:
        """Heartbeat of one rank (supervise/heartbeat.py)."""
        return self.heartbeats / f"rank_{rank}.json"

    @property
    def hang(self) -> Path:
        """Exists once a rank of this attempt has detected a hang (supervise/watchdog.py)."""
        return self.heartbeats / "hang"

    @property
    def logs(self) -> Path:
        """Folder of the logs of all ranks, and of what ranks tell each other when one fails."""
        return self.path / "logs"

    def log(self, rank: int) -> Path:
        """Log of one rank, over all attempts."""
        return self.logs / f"rank_{rank}.log"

    def hang_stacks(self, rank: int) -> Path:
        """Stack traces of one rank when a hang was detected."""
        return self.logs / f"hang_rank_{rank}.txt"

    def start(self, start_id: str) -> "StartPaths":
        """Files of one start, whose ranks have ``start_id`` in common (Launch.start_id)."""
        return StartPaths(self.logs / f"{START_PREFIX}{start_id}")

    def starts(self) -> list["StartPaths"]:
        """Files of every start that left some; those of earlier ones are removed when another begins."""
        return [StartPaths(folder) for folder in sorted(self.logs.glob(f"{START_PREFIX}*")) if folder.is_dir()]


@dataclass(frozen=True)
class StartPaths:
    """Where the ranks of one start tell each other that they run, and which failed first (supervise/failure.py)."""

    path: Path

    def process(self, rank: int) -> Path:
        """Exists while the process of a rank runs; left behind when it was killed."""
        return self.path / f"rank_{rank}.process"

    @property
    def first_failure(self) -> Path:
        """Which rank ended the start, and why; exists only after a failure (supervise/first_failure.py)."""
        return self.path / "first_failure.json"
