"""A folder of predictions on benchmarks, and their scores.

    FOLDER/<benchmark>/questions.json        what was asked: file and MD5, number of questions, profile, model
    FOLDER/<benchmark>/predictions*.jsonl    one line a question, one file a worker
    FOLDER/scores.json                       written by ``score_folder``

``FOLDER/predictions*.jsonl`` without a folder for each benchmark is read as well.
"""

import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.benchmark import ScoringOptions
from aki_megatron.evaluate.benchmarks.files import QuestionSet
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction, read_predictions
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS, find_benchmark
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore
from aki_megatron.evaluate.judges.prompts import DEFAULT_PROMPTS

SCORES = "scores.json"
QUESTIONS = "questions.json"


@dataclass(frozen=True)
class QuestionsInfo:
    """What a benchmark's questions were when they were asked.

    source         files and MD5 (QuestionSet.source)
    notes          what makes scores not comparable
    num_questions  in the file; a score of fewer predictions is marked as incomplete
    profile        name of the prompt profile
    model          what answered, with a digest of its weights
    max_new_tokens  longest reply
    """

    benchmark: str
    source: str
    num_questions: int
    profile: str = ""
    model: str = ""
    notes: tuple[str, ...] = ()
    max_new_tokens: int = 0

    def save(self, folder: Path) -> None:
        """Write FOLDER/<benchmark>/questions.json."""
        path = folder / self.benchmark / QUESTIONS
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, benchmark: str) -> "QuestionsInfo | None":
        """Read it, None where there is none. Raises DataError for a file of another form."""
        path = folder / benchmark / QUESTIONS
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**values, "notes": tuple(values.get("notes", ()))})
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is not what evaluate.py run writes ({error}); remove it.") from error


def begin_benchmark(
    folder: Path, found: QuestionSet, *, profile: str, model: str, max_new_tokens: int = 0
) -> list[BenchmarkQuestion]:
    """Record what is asked, and return the questions that have no prediction yet, in the order of the file.

    Raises DataError where the folder's predictions on this benchmark are by another model, prompt profile or file.
    """
    name = found.benchmark.name
    info = QuestionsInfo(name, found.source, len(found.questions), profile, model, found.notes, max_new_tokens)
    before = QuestionsInfo.load(folder, name)
    if before is None:
        info.save(folder)
    elif before != info:
        changed = {k: (v, asdict(info)[k]) for k, v in asdict(before).items() if v != asdict(info)[k]}
        lines = "; ".join(f"{key} was {old!r}, now {new!r}" for key, (old, new) in changed.items())
        raise DataError(f"{folder / name} holds other predictions: {lines}. Give another folder, or remove it.")
    place = folder / name
    predictions = read_predictions(place) if any(place.glob("predictions*.jsonl")) else []
    answered = {prediction.question.id for prediction in predictions}
    return [question for question in found.questions if question.id not in answered]


def forget_errors(folder: Path) -> int:
    """Remove the predictions of questions that could not be asked, so that they are asked again; return how many."""
    num_removed = 0
    for path in sorted(folder.glob("*/predictions*.jsonl")):
        predictions = read_predictions(path)
        kept = [prediction for prediction in predictions if not prediction.error]
        if len(kept) < len(predictions):
            replace_text(path, "".join(json.dumps(prediction.to_dict()) + "\n" for prediction in kept))
            num_removed += len(predictions) - len(kept)
    return num_removed


def replace_text(path: Path, text: str) -> None:
    """Write a file at once: who reads it meanwhile finds the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def folder_predictions(folder: Path) -> dict[str, list[Prediction]]:
    """Return the predictions of a folder by benchmark, in the order of the papers' columns.

    Raises DataError for a folder without any, and for predictions on a benchmark that is not known.
    """
    places = [path for path in (folder, *sorted(folder.glob("*/"))) if any(path.glob("predictions*.jsonl"))]
    if not places:
        raise DataError(f"{folder} holds no predictions.jsonl: answer the questions first (tools/evaluate.py run).")
    found: dict[str, list[Prediction]] = defaultdict(list)
    for place in places:
        for prediction in read_predictions(place):
            found[prediction.question.benchmark].append(prediction)
    if unknown := sorted(set(found) - set(BENCHMARKS)):
        raise DataError(
            f"{folder} has predictions on {', '.join(unknown)}; known benchmarks are {', '.join(BENCHMARKS)}."
        )
    for name, predictions in found.items():
        counts = Counter(prediction.question.id for prediction in predictions)
        if twice := [question for question, count in counts.items() if count > 1]:
            raise DataError(f"{folder}: question {twice[0]} of {name} is in two files; remove one of them.")
    return {name: found[name] for name in BENCHMARKS if name in found}


def score_folder(
    folder: Path,
    options: ScoringOptions,
    names: Collection[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> list[BenchmarkScore]:
    """Score the predictions of a folder and write scores.json; only the benchmarks ``names`` if there are any.

    Benchmarks that are not scored now keep their scores in the file.
    """
    wanted = [find_benchmark(name).name for name in names]
    predictions = folder_predictions(folder)
    if missing := [name for name in wanted if name not in predictions]:
        raise DataError(f"{folder} has no predictions on {', '.join(missing)}; it has {', '.join(predictions)}.")
    scores = {score.benchmark: score for score in load_scores(folder)} if (folder / SCORES).exists() else {}
    for name in wanted or predictions:
        progress(f"{name}: {len(predictions[name])} predictions")
        scores[name] = score_benchmark(predictions[name], options, QuestionsInfo.load(folder, name))
    ordered = [scores[name] for name in BENCHMARKS if name in scores]
    text = json.dumps([score.to_dict() for score in ordered], indent=1)
    replace_text(folder / SCORES, text + "\n")
    return ordered


def load_scores(folder: Path) -> list[BenchmarkScore]:
    """Read scores.json. Raises DataError where it is missing or of another form."""
    path = folder / SCORES
    if not path.exists():
        raise DataError(f"{path} does not exist: score the predictions first (tools/evaluate.py score {folder}).")
    try:
        return [BenchmarkScore.from_dict(values) for values in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is not what evaluate.py score writes ({error}); remove it and score again.") from error


def score_benchmark(
    predictions: Sequence[Prediction], options: ScoringOptions, info: QuestionsInfo | None = None
) -> BenchmarkScore:
    """Score the predictions on one benchmark, and record what the score depends on."""
    name = predictions[0].question.benchmark
    score = BENCHMARKS[name].score(predictions, options)
    notes = list(score.notes)
    num_errors = sum(bool(prediction.error) for prediction in predictions)
    if num_errors:
        first = next(prediction for prediction in predictions if prediction.error)
        notes.append(f"{num_errors} questions could not be asked and count as wrong; first: {first.error}")
    if num_empty := sum(not p.reply.strip() and not p.error for p in predictions):
        notes.append(f"{num_empty} replies are empty.")
    if score.judge.num_asked and not score.judge.is_heuristic and options.judge_prompts is DEFAULT_PROMPTS:
        notes.append("Judged with this project's prompts, not with a kit's: published scores are by other prompts.")
    num_expected = info.num_questions if info else 0
    if info is None:
        notes.append("How many questions the file has is not recorded, so the score may be of a part of them.")
    elif num_expected != len(predictions):
        notes.append(f"Of {len(predictions)} of {num_expected} questions.")
    return replace(
        score,
        rules=options.rules.full_name,
        num_questions=len(predictions),
        num_errors=num_errors,
        num_expected=num_expected,
        profiles=tuple(sorted({p.profile for p in predictions if p.profile} | {info.profile if info else ""} - {""})),
        source=info.source if info else "",
        notes=(*(info.notes if info else ()), *notes),
    )
