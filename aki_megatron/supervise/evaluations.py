"""Evaluations of checkpoints by other jobs: what was submitted, and the scores that came back. No torch: tools read it.

    RUN/evaluations/submitted.jsonl      {"step": 1000, "folder": "step_001000"}: one line a submission
    RUN/evaluations/step_001000/         what tools/evaluate.py run wrote; evaluate.log has what the command printed

A line of metrics.jsonl holds, under "evaluations", the scores that came back during its step: with the step that they
are of, which is an earlier one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aki_megatron.supervise.jsonl import append_line, discard_steps_after, has_step, read_intact_lines
from aki_megatron.supervise.run_paths import RunPaths

METRIC = "evaluations"
"""Key of a line of metrics.jsonl."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of the checkpoint of a step, by the names of the papers' columns; of a benchmark without one, its own."""

    step: int
    folder: str
    scores: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def scalars(self) -> dict[str, float]:
        """Return the points for experiment trackers."""
        return {f"evaluation/{name}": value for name, value in self.scores.items()}

    def text(self) -> str:
        """Return the scores on one line."""
        return ", ".join(f"{name} {value:.1f}" for name, value in self.scores.items()) or "no scores"


@dataclass(frozen=True)
class Submission:
    """An evaluation that was asked for; ``folder`` is the name of its folder below RUN/evaluations."""

    step: int
    folder: str


class SubmissionLog:
    """RUN/evaluations/submitted.jsonl."""

    def __init__(self, paths: RunPaths) -> None:
        self._folder = paths.evaluations
        self._path = self._folder / "submitted.jsonl"

    @property
    def exists(self) -> bool:
        """Whether anything was submitted."""
        return self._path.exists()

    def read(self) -> list[Submission]:
        """Return all submissions of steps that still count, oldest first."""
        lines = read_intact_lines(self._path, lambda line: has_step(line) and isinstance(line["folder"], str))
        return [Submission(line["step"], line["folder"]) for line in lines]

    def discard_after(self, step: int) -> None:
        """Forget the submissions of later steps, which are trained again."""
        if self._path.exists():
            discard_steps_after(self._path, step)

    def add(self, step: int) -> Path:
        """Record a submission; return its new folder. A step that is trained again gets another one."""
        name, number = f"step_{step:06d}", 1
        while (self._folder / name).exists():
            number += 1
            name = f"step_{step:06d}_{number}"
        (self._folder / name).mkdir(parents=True)
        append_line(self._path, asdict(Submission(step, name)))
        return self._folder / name

    def folder(self, submission: Submission) -> Path:
        """Return where the evaluation writes."""
        return self._folder / submission.folder


def recorded_evaluations(metrics: Iterable[Mapping[str, Any]], last_step: int) -> set[str]:
    """Return the folders whose scores are in lines of metrics.jsonl up to a step."""
    return {
        str(evaluation.get("folder", ""))
        for line in metrics
        if line["step"] <= last_step
        for evaluation in line.get(METRIC, ())
    }
