"""Metrics to Weights & Biases; the only door to wandb."""

import re
import secrets
from pathlib import Path
from typing import Any

from aki_megatron.supervise.run_paths import metrics_line
from aki_megatron.train.loop import Callback
from aki_megatron.types import StepReport


class WandbCallback(Callback):
    """One wandb run per run folder, offline unless asked otherwise; rank 0 only.

    Offline, every attempt writes a folder of its own, all with the id of the run and its steps;
    ``wandb sync <run folder>/wandb/offline-run-*`` uploads and joins them. wandb takes nothing back that it has: after
    a rollback points follow from the first new step on.
    """

    def __init__(self, folder: Path, *, project: str, mode: str, every: int, config: dict[str, Any]) -> None:
        self.folder = folder
        self.project = project
        self.mode = mode
        self.every = every
        self.config = config
        self.newest = 0

    def on_start(self, step: int) -> None:
        """Open the run, or the same run again."""
        import wandb  # a second of imports that only this rank needs

        identity = run_id(self.folder)
        self.run = wandb.init(
            project=self.project, id=identity, name=identity, resume="allow", mode=self.mode,  # type: ignore[arg-type]
            dir=str(self.folder), config=self.config, settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def after_step(self, step: int, report: StepReport) -> None:
        """Log a point when it is time."""
        if step % self.every == 0 and step > self.newest:
            self.run.log(metrics_line(step, report), step=step)
            self.newest = step

    def on_end(self, step: int) -> None:
        """Close the run."""
        self.run.finish()


def run_id(folder: Path) -> str:
    """The wandb id of a run folder: its name and a few random digits, kept in <folder>/wandb/run_id.

    Neither a job, nor the name alone, which the folders of other people may have too.
    """
    kept = folder / "wandb" / "run_id"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]", "-", "-".join(folder.resolve().parts[-2:]))
        kept.write_text(f"{name}-{secrets.token_hex(3)}\n")
    return kept.read_text().strip()
