"""Metrics to Weights & Biases; the only door to wandb."""

from pathlib import Path
from typing import Any

from aki_megatron.flow import StepReport
from aki_megatron.train.folder import metrics_line


class WandbHook:
    """One wandb run per run folder, offline unless asked otherwise; rank 0 only.

    Offline runs are uploaded later with ``wandb sync <run folder>/wandb/offline-run-*``.
    """

    def __init__(self, folder: Path, *, project: str, mode: str, every: int, config: dict[str, Any]) -> None:
        self.folder = folder
        self.project = project
        self.mode = mode
        self.every = every
        self.config = config

    def on_start(self, step: int) -> None:
        """Open the run. Its id comes from the folder's name, so that a resumed run continues its own curves."""
        import wandb  # a second of imports that only this rank needs

        identity = "-".join(self.folder.resolve().parts[-2:])
        self.run = wandb.init(
            project=self.project, id=identity, name=identity, resume="allow", mode=self.mode,  # type: ignore[arg-type]
            dir=str(self.folder), config=self.config, settings=wandb.Settings(silent=True),
        )  # fmt: skip

    def after_step(self, step: int, report: StepReport) -> None:
        """Log a point when it is time."""
        if step % self.every == 0:
            self.run.log(metrics_line(step, report), step=step)

    def on_end(self, step: int) -> None:
        """Close the run."""
        self.run.finish()
