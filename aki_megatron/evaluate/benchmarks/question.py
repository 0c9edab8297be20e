"""A question of a public benchmark, a model's reply to it, and predictions.jsonl.

One line of predictions.jsonl is one Prediction: the question without its images, and the reply. So saved predictions
are scored again without the benchmark's files.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from aki_megatron.errors import DataError
from aki_megatron.evaluate.jsonl import append_lines, read_lines


class ImageSource(Protocol):
    """An encoded image (PNG, JPEG, ...) that is read when it is needed."""

    def read(self) -> bytes:
        """Return the file's bytes. Raises DataError where they cannot be read."""


@dataclass(frozen=True)
class InlineImage:
    """An image in memory."""

    content: bytes

    def read(self) -> bytes:
        return self.content


@dataclass(frozen=True)
class BenchmarkQuestion:
    """One question.

    benchmark    name in the registry
    id           unique within the benchmark
    text         as in the benchmark's file, without the choices
    answer       reference answer: an option letter, "Yes"/"No", or a text
    choices      letter -> text; empty for a question without choices
    group        which questions belong together: an image of MME, the rotations of a question of MMBench
    category     and ``l2_category``: rows of the per-category tables; some hold a comma list
    details      JSON values that only this benchmark's prompt or scorer reads
    images       in the order of the file; not saved with predictions
    """

    benchmark: str
    id: str
    text: str
    answer: str
    choices: Mapping[str, str] = field(default_factory=dict)
    hint: str = ""
    group: str = ""
    category: str = ""
    l2_category: str = ""
    split: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[ImageSource, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.id:
            raise DataError(f"{self.benchmark}: a question has no id.")


@dataclass(frozen=True)
class Prediction:
    """A question with a model's reply.

    error  why the question could not be asked (an image that cannot be read ...); the reply is then empty, and the
           question is scored as a wrong one and counted
    """

    question: BenchmarkQuestion
    reply: str
    error: str = ""
    profile: str = ""
    """Name of the prompt profile."""

    def to_dict(self) -> dict[str, Any]:
        """Return the object of a line of predictions.jsonl."""
        question = asdict(replace(self.question, images=()))
        del question["images"]
        optional = {"error": self.error, "profile": self.profile}
        return {"question": question, "reply": self.reply} | {name: value for name, value in optional.items() if value}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Prediction":
        """Return the prediction of a line. Raises DataError where it is not of this form."""
        try:
            question = BenchmarkQuestion(**record["question"])
            prediction = cls(**{**record, "question": question})
        except (TypeError, KeyError) as error:
            raise DataError(f"no prediction ({error})") from error
        texts = {"question.id": question.id, "question.answer": question.answer, "reply": prediction.reply}
        for name, value in texts.items():
            if not isinstance(value, str):
                raise DataError(f"{name} is no text but {value!r}")
        return prediction


def append_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Append lines to predictions.jsonl; a line cut short by an interruption before is ended first."""
    append_lines(path, (prediction.to_dict() for prediction in predictions))


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions.jsonl, or all predictions*.jsonl of a folder (one a worker), in the order of files and lines.

    A line that is cut short is what an interrupted run left: its question counts as not answered. A question that is
    there twice with one reply counts once.
    Raises DataError for a missing file, a line of another form, and two replies to one question.
    """
    files = sorted(path.glob("predictions*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{path} holds no predictions.jsonl: answer the questions first (tools/evaluate.py run).")
    found: dict[tuple[str, str], Prediction] = {}
    for file in files:
        for number, record in read_lines(file):
            try:
                prediction = Prediction.from_dict(record)
            except DataError as error:
                raise DataError(f"{file}:{number}: {error}; remove the line.") from error
            key = (prediction.question.benchmark, prediction.question.id)
            if key in found and found[key].reply != prediction.reply:
                raise DataError(
                    f"{file}:{number}: question {key[1]} of {key[0]} has two different replies; remove one of the two."
                )
            found.setdefault(key, prediction)
    return list(found.values())


def check_unique(questions: Sequence[BenchmarkQuestion], path: Path) -> None:
    """Raise DataError where two questions have one id."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"{path}: question {question.id!r} is there twice; a score would count it twice. Mend it.")
        seen.add(question.id)
