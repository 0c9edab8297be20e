"""Submit checkpoints for evaluation by another job, and take the scores into the metrics when they are there.

Training never waits: a submission is a process that is looked at now and then, and so is the file of its scores. What
fails is reported and left out.
"""

import logging
import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from aki_megatron.checkpoint.files import checkpoint_name
from aki_megatron.config.evaluate_section import EvaluateConfig
from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmark_folder import SCORES, load_scores
from aki_megatron.parallel.topology import environment_outside_launch
from aki_megatron.supervise.evaluations import Evaluation, SubmissionLog, recorded_evaluations
from aki_megatron.supervise.jsonl import has_step, read_intact_lines
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.loop import Callback
from aki_megatron.types import StepReport

logger = logging.getLogger("aki_megatron.train")

POLL_SECONDS = 15.0
"""Between two looks at submissions and scores."""

LOG = "evaluate.log"
"""What the command printed, in the folder of the evaluation."""


def evaluation_command(config: EvaluateConfig, checkpoint: Path, folder: Path) -> list[str]:
    """Return the words of the command that evaluates a checkpoint into a folder."""
    words = [*config.command, "run", str(checkpoint), "--out", str(folder), "--score"]
    if config.benchmarks:
        words += ["--benchmarks", ",".join(config.benchmarks)]
    for data in config.data:
        words += ["--data", str(data)]
    if config.per_benchmark:
        words += ["--per_benchmark", str(config.per_benchmark)]
    return [*words, *config.flags]


def read_scores(folder: Path) -> dict[str, float]:
    """Return the scores in a folder by column; of a benchmark without a column that could be computed, its others.

    Raises DataError where there is no file of scores, or one of another form.
    """
    found: dict[str, float] = {}
    for score in load_scores(folder):
        found |= _finite(score.columns) or _finite(score.others)
    return found


def _finite(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def read_evaluations(paths: RunPaths) -> list[Evaluation]:
    """Return all evaluations of a run that have scores now, in the order of their steps."""
    log, found = SubmissionLog(paths), []
    for submission in log.read():
        try:
            found.append(Evaluation(submission.step, submission.folder, read_scores(log.folder(submission))))
        except DataError:
            continue  # not scored yet, or damaged
    return sorted(found, key=lambda evaluation: evaluation.step)


class EvaluationCallback(Callback):
    """Submit checkpoints and hand on their scores; rank 0 only, before the callbacks that take the scores."""

    def __init__(
        self,
        config: EvaluateConfig,
        paths: RunPaths,
        report: Callable[[str], None],
        *,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        """Create the callback.

        report  told what failed
        """
        self.listeners: Sequence[Callback] = ()
        """Get the scores (``on_evaluation``)."""
        self._config, self._paths, self._report = config, paths, report
        self._log = SubmissionLog(paths)
        self._poll_seconds = poll_seconds
        self._next_poll = 0.0
        self._processes: list[tuple[int, Path, subprocess.Popen[bytes]]] = []
        self._recorded: set[str] = set()

    def on_start(self, step: int) -> None:
        self._log.discard_after(step)
        self._recorded = recorded_evaluations(read_intact_lines(self._paths.metrics, has_step), step)
        # a run that was killed between a checkpoint and its submission
        if step and all(submission.step != step for submission in self._log.read()):
            self.submit(step)

    def on_rollback(self, step: int) -> None:
        self.on_start(step)

    def on_step(self, step: int, report: StepReport) -> None:
        now = time.monotonic()
        if now < self._next_poll:
            return
        self._next_poll = now + self._poll_seconds
        self._check_processes()
        for submission in self._log.read():
            folder = self._log.folder(submission)
            if submission.folder in self._recorded or not (folder / SCORES).exists():
                continue
            self._recorded.add(submission.folder)
            try:
                evaluation = Evaluation(submission.step, submission.folder, read_scores(folder))
            except DataError as error:
                self._report(f"the scores of step {submission.step} are left out: {error}")
                continue
            for listener in self.listeners:
                listener.on_evaluation(step, evaluation)

    def submit(self, step: int) -> None:
        """Begin the evaluation of the checkpoint of a step, if it is one that is evaluated; never raises."""
        if self._config.interval == 0 or step == 0 or step % self._config.interval:
            return
        checkpoint = self._paths.checkpoints.resolve() / checkpoint_name(step)
        try:
            folder = self._log.add(step).resolve()
            command = evaluation_command(self._config, checkpoint, folder)
            with (folder / LOG).open("wb") as output:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=environment_outside_launch(),
                )
        except (OSError, ValueError) as error:
            self._report(f"the checkpoint of step {step} is not evaluated: {error}")
            return
        logger.info("evaluation of step %d: %s", step, " ".join(command))
        self._processes.append((step, folder / LOG, process))

    def _check_processes(self) -> None:
        """Report commands that have failed, and forget those that have ended."""
        running = []
        for step, log, process in self._processes:
            if (code := process.poll()) is None:
                running.append((step, log, process))
            elif code:
                self._report(f"the evaluation of step {step} ended with exit code {code}: {_last_line(log)} ({log})")
        self._processes = running


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return lines[-1][-300:] if lines else "it printed nothing"
