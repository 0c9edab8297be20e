"""Metrics to Weights & Biases: the adapter to wandb."""

import re
import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from aki_megatron.masking import mask_text
from aki_megatron.supervise.evaluations import Evaluation
from aki_megatron.supervise.metrics import metrics_of
from aki_megatron.supervise.validations import ValidationReport, scalars_of
from aki_megatron.train.loop import Callback
from aki_megatron.types import StepReport

END_SECONDS, STOP_SECONDS = 120.0, 10.0
"""How long wandb may upload at the end of a run, and at that of an attempt, which a scheduler may be about to kill."""

EVALUATION_STEP = "evaluation/step"
"""The step that scores are of."""

SERVICE = "wandb-core"
"""Process that does wandb's work."""


class WandbCallback(Callback):
    """Log all metrics to one wandb run per run folder, offline unless configured otherwise; rank 0 only.

    Offline, every attempt writes a folder of its own, all with the id of the run and its steps;
    ``wandb sync <run folder>/wandb/offline-run-*`` uploads and joins them. wandb cannot delete points: after a
    rollback it continues with the first step that it does not have yet.
    """

    def __init__(self, folder: Path, *, project: str, mode: str, interval: int, config: dict[str, Any]) -> None:
        self.folder = folder
        self.project = project
        self.mode = mode
        self.interval = interval
        self.config = config
        self.last_step = 0

    def on_start(self, step: int) -> None:
        import wandb  # a second of imports that only this rank needs

        name = run_id(self.folder)
        with _masked_command_line():
            self.run = wandb.init(
                project=self.project, id=name, name=name, resume="allow", mode=self.mode,  # type: ignore[arg-type]
                dir=str(self.folder), config=self.config, settings=wandb.Settings(silent=True),
            )  # fmt: skip
        # scores come after their step, and wandb takes no points of earlier steps: they have an axis of their own
        self.run.define_metric("evaluation/*", step_metric=EVALUATION_STEP)

    def on_step(self, step: int, report: StepReport) -> None:
        if step % self.interval == 0 and step > self.last_step:
            self.run.log(metrics_of(step, report), step=step)
            self.last_step = step

    def on_validation(self, step: int, report: ValidationReport) -> None:
        if step >= self.last_step:
            self.run.log(scalars_of(report), step=step)
            self.last_step = step

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        if step >= self.last_step:
            self.run.log({EVALUATION_STEP: evaluation.step, **evaluation.scalars()}, step=step)

    def on_stop(self, step: int) -> None:
        self._finish(STOP_SECONDS)

    def on_end(self, step: int) -> None:
        self._finish(END_SECONDS)

    def _finish(self, seconds: float) -> None:
        """Finish the wandb run. Raises TimeoutError where that takes long: without a network it tries for hours."""
        failures: list[Exception] = []

        def finish() -> None:
            try:
                self.run.finish()
            except Exception as error:  # whatever it raises, this thread must not print it
                failures.append(error)

        thread = threading.Thread(target=finish, name="wandb finish", daemon=True)
        thread.start()
        thread.join(seconds)
        if failures:
            raise failures[0]
        if thread.is_alive():
            for child in psutil.Process().children():
                if SERVICE in child.name():
                    child.kill()  # or this process could not end before it does
                    child.wait(STOP_SECONDS)  # or wandb would find its exit code, and end this process with it
            raise TimeoutError(
                f"wandb did not finish within {seconds:g} s. Its points are in {self.folder}/wandb; upload them with "
                "wandb sync."
            )

    def on_failure(self) -> None:
        """Forget wandb's service, a process that SIGTERM ends: at exit wandb would try to reach it, and fail again."""
        import wandb

        with suppress(Exception):
            wandb.teardown()


@contextmanager
def _masked_command_line() -> Iterator[None]:
    """Mask the secrets of sys.argv, which wandb uploads with the run."""
    kept = sys.argv
    sys.argv = [mask_text(argument) for argument in kept]
    try:
        yield
    finally:
        sys.argv = kept


def run_id(folder: Path) -> str:
    """Return the wandb id of a run folder: its name and a few random digits, kept in <folder>/wandb/run_id.

    The digits distinguish it from folders of the same name; the id does not depend on the job, which changes.
    """
    path = folder / "wandb" / "run_id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^\w.-]", "-", "-".join(folder.resolve().parts[-2:]))
        path.write_text(f"{name}-{secrets.token_hex(3)}\n")
    return path.read_text().strip()
