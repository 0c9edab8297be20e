"""POPE: is there such an object? The headline is F1 over the three samplings of absent objects together.

A reply without an answer counts as "no" for precision, recall and F1, and as wrong for the accuracy.
"""

from collections.abc import Sequence

from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, ScoreTable, percent
from aki_megatron.evaluate.benchmarks.yes_no_scoring import PARSER, YesNo, read_answers, yes_or_no
from aki_megatron.evaluate.extraction.rules import Rules

SPLITS = ("random", "popular", "adversarial")


def read_tsv(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's table; its category is a comma list of the samplings that the question is in."""
    return BenchmarkQuestion(
        benchmark="POPE",
        id=record.text("index"),
        text=record.text("question"),
        answer=yes_or_no(record.text("answer")),
        category=record.text("category"),
        images=record.images,
    )


def read_parquet(record: Record) -> BenchmarkQuestion:
    """Read a row of lmms-lab/POPE."""
    category = record.text("category")
    return BenchmarkQuestion(
        benchmark="POPE",
        id=record.text("id", default="") or f"{category}/{record.text('question_id')}",
        text=record.text("question"),
        answer=yes_or_no(record.text("answer")),
        category=category,
        images=record.images,
    )


def aggregate(predictions: Sequence[Prediction], rules: Rules) -> dict[str, dict[str, float]]:
    """Return acc, precision, recall, f1, yes_ratio (percent), n, n_unknown of ``Overall`` and of each split."""
    rows = [
        (split, answer)
        for answer in read_answers(predictions, rules)
        for split in answer.prediction.question.category.split(",")
    ]
    splits = dict.fromkeys(split for split, _ in rows if split)
    groups = {split: [answer for other, answer in rows if other == split] for split in splits}
    return {"Overall": _rates([answer for _, answer in rows])} | {name: _rates(g) for name, g in groups.items()}


def _rates(answers: Sequence[YesNo]) -> dict[str, float]:
    said_yes = [answer.extracted == "Yes" for answer in answers]
    is_yes = [answer.prediction.question.answer == "Yes" for answer in answers]
    both = sum(said and true for said, true in zip(said_yes, is_yes, strict=True))
    precision = both / sum(said_yes) if any(said_yes) else 0.0
    recall = both / sum(is_yes) if any(is_yes) else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "acc": percent([answer.is_hit for answer in answers]) or 0.0,
        "precision": 100 * precision,
        "recall": 100 * recall,
        "f1": 100 * f1,
        "yes_ratio": percent(said_yes) or 0.0,
        "n": len(answers),
        "n_unknown": sum(answer.is_unknown for answer in answers),
    }


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score POPE."""
    found = aggregate(predictions, options.rules)
    unknown = sorted(set(found) - {"Overall", *SPLITS})
    header = ("split", "acc", "precision", "recall", "F1", "yes ratio", "rows", "unknown")
    rows: list[tuple[str | float, ...]] = [
        (name, *found[name].values()) for name in ("Overall", *SPLITS, *unknown) if name in found
    ]
    return BenchmarkScore(
        benchmark="POPE",
        columns={"POPE": found["Overall"]["f1"]},
        others={"POPE accuracy": found["Overall"]["acc"]},
        tables=(ScoreTable("POPE by split", header, tuple(rows)),),
        parser=PARSER,
        num_undecided=sum(answer.is_unknown for answer in read_answers(predictions, options.rules)),
        notes=(f"In Overall, but no splits of POPE: {', '.join(unknown)}.",) if unknown else (),
    )


POPE = Benchmark(
    name="POPE",
    columns=("POPE",),
    tsv_files=(TsvFile("POPE", "c12f5acb142f2ef1f85a26ba2fbe41d5"),),
    hub_files=(HubFiles("lmms-lab/POPE", ("test",)), HubFiles("lmms-lab/POPE", SPLITS)),
    read_tsv=read_tsv,
    read_parquet=read_parquet,
    score=score,
    lmms_task="pope",
    num_hub_questions=9000,
)
