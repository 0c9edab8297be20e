"""MME: yes/no questions in 14 subtasks, two to an image.

Of a subtask: acc is the percentage of questions, acc+ that of images with both questions right; the score is their
sum. Perception and cognition are sums over 10 and 4 subtasks.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, ScoreTable, percent
from aki_megatron.evaluate.benchmarks.yes_no_scoring import PARSER, YesNo, read_answers, yes_or_no
from aki_megatron.evaluate.extraction.rules import Rules

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_tsv(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's table."""
    return BenchmarkQuestion(
        benchmark="MME",
        id=record.text("index"),
        text=record.text("question"),
        answer=yes_or_no(record.text("answer")),
        group=record.text("image_path"),
        category=record.text("category"),
        images=record.images,
    )


def read_parquet(record: Record) -> BenchmarkQuestion:
    """Read a row of lmms-lab/MME; its question_id names the image, ``finish`` makes the ids unique."""
    image = record.text("question_id")
    return BenchmarkQuestion(
        benchmark="MME",
        id=image,
        text=record.text("question"),
        answer=yes_or_no(record.text("answer")),
        group=image,
        category=record.text("category"),
        details={"numbered": True},
        images=record.images,
    )


def finish(questions: Sequence[BenchmarkQuestion], path: Path) -> Sequence[BenchmarkQuestion]:
    """Number the questions of each image where the file has no id of a question."""
    del path
    seen: dict[str, int] = defaultdict(int)
    named = []
    for question in questions:
        if question.details.get("numbered"):
            seen[question.group] += 1
            question = replace(question, id=f"{question.group}#{seen[question.group]}", details={})
        named.append(question)
    return named


def aggregate(predictions: Sequence[Prediction], rules: Rules) -> dict[str, Any]:
    """Return perception, cognition (None where a subtask is missing), subtasks, n_unknown."""
    answers = read_answers(predictions, rules)
    by_category: dict[str, list[YesNo]] = defaultdict(list)
    for answer in answers:
        by_category[answer.prediction.question.category].append(answer)
    subtasks = {category: _subtask(group) for category, group in by_category.items()}
    return {
        "perception": _total(subtasks, PERCEPTION),
        "cognition": _total(subtasks, COGNITION),
        "subtasks": subtasks,
        "n_unknown": sum(answer.is_unknown for answer in answers),
    }


def _subtask(answers: Sequence[YesNo]) -> dict[str, float]:
    by_image: dict[str, list[bool]] = defaultdict(list)
    for answer in answers:
        by_image[answer.prediction.question.group].append(answer.is_hit)
    acc = percent([answer.is_hit for answer in answers]) or 0.0
    # as the kit: the first two questions of an image; an image with one answered question is not right
    acc_plus = percent([len(hits) > 1 and all(hits[:2]) for hits in by_image.values()]) or 0.0
    return {"score": acc + acc_plus, "acc": acc, "acc_plus": acc_plus}


def _total(subtasks: dict[str, dict[str, float]], names: tuple[str, ...]) -> float | None:
    return sum(subtasks[name]["score"] for name in names) if set(names) <= set(subtasks) else None


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score MME."""
    found = aggregate(predictions, options.rules)
    order = [*PERCEPTION, *COGNITION]
    unknown = sorted(set(found["subtasks"]) - set(order))
    missing = [name for name in order if name not in found["subtasks"]]
    notes = [f"No question of {', '.join(missing)}: their sum is not computed."] if missing else []
    if unknown:
        notes.append(f"In no sum, because they are no subtasks of MME: {', '.join(unknown)}.")
    rows = [(name, *found["subtasks"][name].values()) for name in [*order, *unknown] if name in found["subtasks"]]
    return BenchmarkScore(
        benchmark="MME",
        columns={"MMEP": found["perception"], "MMEC": found["cognition"]},
        tables=(ScoreTable("MME by subtask", ("subtask", "score", "acc", "acc+"), tuple(rows)),),
        parser=PARSER,
        num_undecided=found["n_unknown"],
        notes=tuple(notes),
    )


MME = Benchmark(
    name="MME",
    columns=("MMEP", "MMEC"),
    tsv_files=(TsvFile("MME", "b36b43c3f09801f5d368627fb92187c3"),),
    hub_files=(HubFiles("lmms-lab/MME", ("test",)),),
    read_tsv=read_tsv,
    read_parquet=read_parquet,
    finish=finish,
    score=score,
    lmms_task="mme",
    num_hub_questions=2374,
)
