"""validation.jsonl: one JSON object per validation, by the step after which it was made. No torch: tools read it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.supervise.jsonl import has_step, read_lines


@dataclass(frozen=True)
class Answer:
    """A question with its reference answer and the generated one."""

    question: str
    reference_answer: str
    generated_answer: str


@dataclass(frozen=True)
class SourceValidation:
    """What one source contributes to a validation, summed over all ranks."""

    loss: float
    """Mean over its supervised tokens; nan without one."""
    supervised_tokens: int
    samples: int
    questions: int = 0
    """Questions that were answered."""
    correct: int = 0
    example: Answer | None = None
    """The first question, on rank 0 alone; None where none was answered."""

    @property
    def accuracy(self) -> float | None:
        """Correct answers in percent; None without questions."""
        return 100 * self.correct / self.questions if self.questions else None


@dataclass(frozen=True)
class ValidationReport:
    """One validation, the same on all ranks."""

    sources: Mapping[str, SourceValidation]
    bad_samples: int
    seconds: float
    is_best: bool = False
    """Whether the loss is the lowest so far of those whose checkpoint is kept."""

    @property
    def supervised_tokens(self) -> int:
        """Positions with a target in all sources."""
        return sum(source.supervised_tokens for source in self.sources.values())

    @property
    def loss(self) -> float:
        """Mean over the supervised tokens of all sources, as the loss of a training step; nan without one."""
        losses = [
            source.loss * source.supervised_tokens for source in self.sources.values() if source.supervised_tokens
        ]
        return sum(losses) / self.supervised_tokens if losses else math.nan

    @property
    def accuracy(self) -> float | None:
        """Correct answers of all sources in percent; None without questions."""
        questions = sum(source.questions for source in self.sources.values())
        return 100 * sum(source.correct for source in self.sources.values()) / questions if questions else None


def line_of(step: int, report: ValidationReport) -> dict[str, Any]:
    """Return the line of validation.jsonl; numbers that are not finite become None."""
    sources = {}
    for name, source in report.sources.items():
        line: dict[str, Any] = {
            "loss": _finite(source.loss), "supervised_tokens": source.supervised_tokens, "samples": source.samples
        }  # fmt: skip
        if source.questions:
            line |= {"questions": source.questions, "correct": source.correct, "accuracy": source.accuracy}
        if source.example is not None:
            line["example"] = vars(source.example)
        sources[name] = line
    return {
        "step": step,
        "loss": _finite(report.loss),
        "accuracy": report.accuracy,
        "supervised_tokens": report.supervised_tokens,
        "bad_samples": report.bad_samples,
        "seconds": report.seconds,
        "is_best": report.is_best,
        "sources": sources,
    }


def scalars_of(report: ValidationReport) -> dict[str, float]:
    """Return the curves of a validation by name, for experiment trackers; without numbers that are not finite."""
    parts = {"validation": (report.loss, report.accuracy)}
    parts |= {f"validation/{name}": (source.loss, source.accuracy) for name, source in report.sources.items()}
    scalars: dict[str, float] = {}
    for prefix, (loss, accuracy) in parts.items():
        scalars |= {f"{prefix}/loss": loss} if math.isfinite(loss) else {}
        scalars |= {} if accuracy is None else {f"{prefix}/accuracy": accuracy}
    return scalars


def read_validations(path: Path) -> list[dict[str, Any]]:
    """Return the lines of validation.jsonl, one per validation. Raises DataError that names a damaged line."""
    return read_lines(path, is_validation)


def is_validation(line: Mapping[str, Any]) -> bool:
    """Return whether a line has what readers need of a validation; KeyError or TypeError where it does not."""
    numbers = [line["loss"], line["accuracy"], *(source["loss"] for source in line["sources"].values())]
    return has_step(line) and all(isinstance(number, int | float | None) for number in numbers)


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
