"""MMBench dev (English): every question is asked once with each rotation of its options.

Circular evaluation: a question is right only if all its rotations are. Rotations have the index of the unrotated
question plus a multiple of one million. Vanilla evaluation, printed beside it, counts rows.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.choice_scoring import (
    PARSER,
    Choice,
    accuracies,
    accuracy_table,
    read_choices,
)
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, percent
from aki_megatron.evaluate.extraction.rules import Rules

ROTATION = 1_000_000
"""The index of a rotation is that of its question plus a multiple of this."""

SHORT_NAMES = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}

OLD_ROWS = 4377
"""Rows of the file of 2023-07-12, which has 1176 questions instead of 1164."""


def short_name(category: str) -> str:
    """Return the abbreviation of a second-level category."""
    return SHORT_NAMES.get(category, category)


def read(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's table, or of lmms-lab/MMBench, which has the same columns."""
    index = record.text("index")
    if not index.isascii() or not index.isdigit():
        raise DataError(f"{record.where}: index {index!r} is no whole number, so its rotations cannot be found.")
    return BenchmarkQuestion(
        benchmark="MMBench",
        id=index,
        text=record.text("question"),
        answer=record.text("answer"),
        choices=record.choices(),
        hint=record.hint(),
        group=str(int(index) % ROTATION),
        category=record.text("category"),
        l2_category=record.text("l2-category", "L2-category"),
        split=record.text("split", default="dev"),
        images=record.images,
    )


def finish(questions: Sequence[BenchmarkQuestion], path: Path) -> Sequence[BenchmarkQuestion]:
    """Raise DataError for the old file."""
    if len(questions) == OLD_ROWS:
        raise DataError(
            f"{path} has {OLD_ROWS} rows: it is the MMBench dev file of July 2023. The papers' has 4329; "
            "get MMBench_DEV_EN.tsv (VLMEvalKit) or lmms-lab/MMBench, config en."
        )
    return questions


def is_unrotated(choice: Choice) -> bool:
    """Whether a row shows its options in the original order."""
    return choice.prediction.question.id == choice.prediction.question.group


def aggregate(predictions: Sequence[Prediction], rules: Rules) -> dict[str, Any]:
    """Return n_questions, circular, vanilla_all_rows, vanilla_unrotated_rows, circular_hits (by unrotated index).

    Rows without their unrotated row are no questions; rotations may be missing.
    """
    choices = read_choices(predictions, rules)
    by_group: dict[str, list[Choice]] = defaultdict(list)
    for choice in choices:
        by_group[choice.prediction.question.group].append(choice)
    unrotated = [choice for choice in choices if is_unrotated(choice)]
    hits = {choice.prediction.question.id: all_right(by_group[choice.prediction.question.id]) for choice in unrotated}
    circular = [
        choice if hits[choice.prediction.question.id] else Choice(choice.prediction, choice.answer, None)
        for choice in unrotated
    ]
    return {
        "n_questions": len(unrotated),
        "circular": accuracies(circular, short_name),
        "vanilla_all_rows": accuracies(choices, short_name),
        "vanilla_unrotated_rows": accuracies(unrotated, short_name),
        "circular_hits": hits,
    }


def all_right(rotations: Sequence[Choice]) -> bool:
    """Whether every rotation of a question is decided and right."""
    return all(rotation.is_hit and not rotation.is_undecided for rotation in rotations)


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score MMBench dev."""
    found = aggregate(predictions, options.rules)
    choices = read_choices(predictions, options.rules)
    groups = {choice.prediction.question.group for choice in choices}
    orphans = groups - set(found["circular_hits"])
    columns = {
        "circular": found["circular"],
        "vanilla, all rows": found["vanilla_all_rows"],
        "vanilla, unrotated": found["vanilla_unrotated_rows"],
    }
    return BenchmarkScore(
        benchmark="MMBench",
        columns={"MMB": percent([bool(hit) for hit in found["circular_hits"].values()])},
        others={"MMBench vanilla": found["vanilla_all_rows"]["Overall"]},
        tables=(accuracy_table("MMBench dev by category", columns),),
        parser=f"{PARSER}; circular",
        num_undecided=sum(choice.is_undecided for choice in choices),
        notes=(f"{len(orphans)} questions without their unrotated row are not counted.",) if orphans else (),
    )


MMBENCH = Benchmark(
    name="MMBench",
    columns=("MMB",),
    tsv_files=(TsvFile("MMBench_DEV_EN", "b6caf1133a01c6bb705cf753bb527ed8", "benchmarks/MMBench"),),
    hub_files=(HubFiles("lmms-lab/MMBench", ("dev",), config="en"),),
    wrong_md5s={"30c05be8f2f347a50be25aa067248184": "MMBench_DEV_EN_V11"},
    read_tsv=read,
    read_parquet=read,
    finish=finish,
    score=score,
    lmms_task="mmbench_en_dev",
    num_hub_questions=4329,
)
