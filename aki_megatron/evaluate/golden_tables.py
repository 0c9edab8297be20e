"""Whole tables of made-up replies, for golden_replies.py: aggregated as the scorers do."""

import random
from collections.abc import Callable, Mapping
from typing import Any

from aki_megatron.evaluate.benchmarks import cvbench, llavabench, mathvista, mmbench, mme, mmmu, mmvet, pope
from aki_megatron.evaluate.benchmarks.choice_scoring import accuracies, read_choices
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import percent
from aki_megatron.evaluate.extraction.rules import Rules
from aki_megatron.evaluate.judges.judging import first_usable

Row = Mapping[str, Any]


def by_rules(find: Callable[[Rules], Any]) -> dict[str, Any]:
    """Return what ``find`` gives for each version of the rules."""
    return {rules.value: find(rules) for rules in Rules}


def to_prediction(row: Row) -> Prediction:
    """Return a recorded row as a prediction."""
    index = row.get("index", row.get("id", row.get("idx")))
    question = BenchmarkQuestion(
        benchmark="golden",
        id=str(index),
        text=row.get("question", ""),
        answer=str(row.get("answer", "")),
        choices=row.get("options") or {},
        group=row.get("image_path") or (str(index % mmbench.ROTATION) if isinstance(index, int) else ""),
        category=row.get("category") or "",
        l2_category=row.get("l2-category") or "",
        split=row.get("split") or "",
    )
    return Prediction(question, row["prediction"])


def mathvista_question(row: Row) -> BenchmarkQuestion:
    """Return a recorded row of MathVista as a question."""
    choices = row["choices"] or []
    return BenchmarkQuestion(
        benchmark="golden",
        id=str(row.get("index", row.get("id"))),
        text=row["question"],
        answer=str(row["answer"]),
        choices={chr(ord("A") + number): str(text) for number, text in enumerate(choices)},
        category=row.get("task") or "",
        details={
            "question_type": row["question_type"],
            "answer_type": row["answer_type"],
            "answer_option": row["answer_option"],
            "skills": row.get("skills") or [],
        },
    )


def _mme(case: Row) -> Any:
    predictions = [to_prediction(row) for row in case["rows"]]
    return by_rules(lambda rules: mme.aggregate(predictions, rules))


def _pope(case: Row) -> Any:
    predictions = [to_prediction(row) for row in case["rows"]]
    return by_rules(lambda rules: pope.aggregate(predictions, rules))


def _choices(case: Row) -> Any:
    predictions = [to_prediction(row) for row in case["rows"]]

    def find(rules: Rules) -> Any:
        choices = read_choices(predictions, rules)
        return {
            "scores": accuracies(choices),
            "n_hit": sum(choice.is_hit for choice in choices),
            "n_undecided": sum(choice.is_undecided for choice in choices),
        }

    return by_rules(find)


def _mmbench(case: Row) -> Any:
    predictions = [to_prediction(row) for row in case["rows"]]
    return by_rules(lambda rules: mmbench.aggregate(predictions, rules))


def _mmmu_kit(case: Row) -> Any:
    predictions = [to_prediction(row) for row in case["rows"]]

    def find(rules: Rules) -> Any:
        choices = mmmu.read_kit(predictions, rules)
        hits = sum(choice.is_hit for choice in choices)
        return {"scores_per_split": mmmu.kit_accuracies(choices), "n_hit": hits}

    return by_rules(find)


def _mmmu_official(case: Row) -> Any:
    draw = random.Random(42)  # one generator for the whole table, in the order of its rows
    drawn, strict, num_drawn = [], [], 0
    for row in case["rows"]:
        choices = (row["options"] or {}) if row["question_type"] == "multiple-choice" else None
        hit, is_drawn = mmmu.official_hit(row["prediction"], choices, row["answer"], draw)
        num_drawn += is_drawn
        drawn.append((row["category"], hit))
        strict.append((row["category"], hit and not is_drawn))
    return {
        "seed42_in_row_order": mmmu.official_accuracies(drawn),
        "fallback_counted_wrong": mmmu.official_accuracies(strict),
        "n_random_fallback": num_drawn,
        "judge_seed42": [hit for _, hit in drawn],
    }


def _mathvista(case: Row) -> Any:
    predictions = [Prediction(mathvista_question(row), row["prediction"]) for row in case["rows"]]
    return by_rules(lambda rules: mathvista.aggregate([mathvista.outcome(p, rules) for p in predictions]))


def _cvbench(case: Row) -> Any:
    hits = [
        (row["source"], cvbench.is_strict_hit(row["prediction"], cvbench.letter_of(row["answer"])))
        for row in case["rows"]
    ]
    return cvbench.aggregate(hits) | {"row_mean_for_contrast": percent([hit for _, hit in hits])}


def _mmvet(case: Row) -> Any:
    judgements = [first_usable(row["judge_replies"], mmvet.read_grade) for row in case["rows"]]
    pairs = zip(case["rows"], judgements, strict=True)
    found = mmvet.aggregate([(row["category"], mmvet.grade_of(judgement)) for row, judgement in pairs])
    return found | {"n_failed": sum(judgement.value is None for judgement in judgements)}


def _llavabench(case: Row) -> Any:
    grades = [(row["category"], llavabench.read_grades(row["judge_reply"])) for row in case["rows"]]
    return llavabench.aggregate_both(grades)


TABLES: dict[str, Callable[[Row], Any]] = {
    "table_mme": _mme,
    "table_pope": _pope,
    "table_seed": _choices,
    "table_realworldqa": _choices,
    "table_mmbench": _mmbench,
    "table_mmmu_kit": _mmmu_kit,
    "table_mmmu_official": _mmmu_official,
    "table_mathvista": _mathvista,
    "table_cvbench": _cvbench,
    "table_mmvet": _mmvet,
    "table_llavabench": _llavabench,
}
