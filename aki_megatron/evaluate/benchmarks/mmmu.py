"""MMMU, dev and validation apart: 30 subjects, choice and open questions, up to seven images.

Two parsers: "kit" (VLMEvalKit; the default, which the papers used) makes a choice of an open question for scoring,
A = its answer, B = "Other Answers". "official" is the repository's; where it finds no letter, one is drawn, here by a
generator seeded with the question's id.
"""

import ast
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.choice_scoring import (
    PARSER,
    Accuracies,
    Choice,
    accuracies,
    accuracy_table,
    read_choice,
)
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, mean
from aki_megatron.evaluate.extraction.mmmu_official import open_is_correct, parse_choice, parse_open
from aki_megatron.evaluate.extraction.rules import Rules

SPLITS = ("validation", "dev")

SUBJECTS = {
    "Art & Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health & Medicine": (
        "Basic_Medical_Science", "Clinical_Medicine", "Diagnostics_and_Laboratory_Medicine", "Pharmacy",
        "Public_Health",
    ),
    "Humanities & Social Science": ("History", "Literature", "Psychology", "Sociology"),
    "Tech & Engineering": (
        "Agriculture", "Architecture_and_Engineering", "Computer_Science", "Electronics", "Energy_and_Power",
        "Materials", "Mechanical_Engineering",
    ),
}  # fmt: skip
"""Discipline -> subjects."""

DISCIPLINES = {subject: discipline for discipline, subjects in SUBJECTS.items() for subject in subjects}

CAPITALS = frozenset(chr(code) for code in range(ord("A"), ord("Z") + 1))


def read_tsv(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's table; a question without options is an open one."""
    return BenchmarkQuestion(
        benchmark="MMMU",
        id=record.text("index"),
        text=record.text("question"),
        answer=record.text("answer"),
        choices=record.choices(),
        category=record.text("category", default=""),
        l2_category=record.text("l2-category", default=""),
        split=record.text("split"),
        images=record.images,
    )


def read_parquet(record: Record) -> BenchmarkQuestion:
    """Read a row of MMMU/MMMU or lmms-lab/MMMU; the id is ``{split}_{subject}_{number}``."""
    name = record.text("id")
    split, _, rest = name.partition("_")
    subject = rest.rpartition("_")[0]
    options = _options(record)
    is_open = record.text("question_type", default="multiple-choice") == "open"
    return BenchmarkQuestion(
        benchmark="MMMU",
        id=name,
        text=record.text("question"),
        answer=record.text("answer"),
        choices={} if is_open else {chr(ord("A") + number): text for number, text in enumerate(options)},
        category=subject,
        l2_category=DISCIPLINES.get(subject, ""),
        split=split,
        images=record.images,
    )


def _options(record: Record) -> list[str]:
    """Return the options, which the parquet files hold as a Python list written as text."""
    written = record.text("options", default="[]")
    try:
        options = ast.literal_eval(written)
    except (ValueError, SyntaxError) as error:
        raise DataError(f"{record.where}: options {written[:80]!r} are no list.") from error
    return [str(option) for option in options] if isinstance(options, list) else []


def kit_choices(choices: Mapping[str, str], answer: str) -> Mapping[str, str]:
    """Return the options that an open question is scored with, and those of a choice question unchanged."""
    return choices or {"A": answer, "B": "Other Answers"}


def kit_answer(answer: str) -> str:
    """Return the letter that counts as right: the answer itself if it is one capital letter, else A."""
    return answer if answer in CAPITALS else "A"


def read_kit(predictions: Sequence[Prediction], rules: Rules) -> list[Choice]:
    """Read the option of every reply as VLMEvalKit does."""
    return [
        read_choice(
            prediction,
            rules,
            choices=kit_choices(prediction.question.choices, prediction.question.answer),
            answer=kit_answer(prediction.question.answer),
        )
        for prediction in predictions
    ]


def kit_accuracies(choices: Sequence[Choice]) -> dict[str, Accuracies]:
    """Return the accuracies of each split; every split has a value for every category, None without a question."""
    splits = dict.fromkeys(choice.prediction.question.split for choice in choices)
    by_split = {split: [choice for choice in choices if choice.prediction.question.split == split] for split in splits}
    return {split: accuracies(group, among=choices) for split, group in by_split.items()}


def reference_answers(question: BenchmarkQuestion) -> str | list[str]:
    """Return the accepted answers: some open questions hold a list of them as text."""
    if question.choices or not question.answer.startswith("["):
        return question.answer
    try:
        answers = ast.literal_eval(question.answer)
    except (ValueError, SyntaxError):
        return question.answer
    return [str(answer) for answer in answers] if isinstance(answers, list) else question.answer


def official_hit(
    reply: str, choices: Mapping[str, str] | None, answers: str | Sequence[str], draw: random.Random | None
) -> tuple[bool, bool]:
    """Return whether a reply is right by the official parser, and whether the parser found no letter in it.

    choices  None for an open question
    draw     draws a letter where the parser finds none; None: it is then wrong
    """
    if choices is None:
        return open_is_correct(parse_open(reply), answers), False
    letter = parse_choice(reply, choices)
    is_drawn = letter is None
    if is_drawn and draw is not None and choices:
        letter = draw.choice(list(choices))
    return letter == answers or (not isinstance(answers, str) and letter in answers), is_drawn


def official_accuracies(hits: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """Return fractions: overall, and acc and num_example of each category. ``hits`` are (category, is right)."""
    by_category: dict[str, list[bool]] = defaultdict(list)
    for category, hit in hits:
        by_category[category].append(hit)
    return {
        "overall": mean([hit for _, hit in hits]),
        "categories": {name: {"acc": mean(group), "num_example": len(group)} for name, group in by_category.items()},
    }


def read_official(predictions: Sequence[Prediction]) -> tuple[list[Choice], int]:
    """Return every prediction as right (its extracted letter is the answer's) or wrong, and how many were drawn."""
    found, num_drawn = [], 0
    for prediction in predictions:
        question = prediction.question
        draw = random.Random(f"MMMU {question.id}")
        hit, is_drawn = official_hit(prediction.reply, question.choices or None, reference_answers(question), draw)
        num_drawn += is_drawn
        found.append(Choice(prediction, "A", "A" if hit else "B"))
    return found, num_drawn


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score MMMU, each split apart."""
    official = options.mmmu_parser == "official"
    if official:
        choices, num_undecided = read_official(predictions)
    else:
        choices = read_kit(predictions, options.rules)
        num_undecided = sum(choice.is_undecided for choice in choices)
    by_split = kit_accuracies(choices)
    unknown = sorted(set(by_split) - set(SPLITS))
    others = {"MMMU dev": by_split["dev"]["Overall"]} if "dev" in by_split else {}
    notes = [f"Neither dev nor validation: {', '.join(unknown)}; not in the column."] if unknown else []
    if "validation" not in by_split:
        notes.append("No question of the validation split, which the column is of.")
    if official:
        notes.append("Where the official parser finds no letter, one is drawn, seeded with the question's id.")
    return BenchmarkScore(
        benchmark="MMMU",
        columns={"MMMU": by_split["validation"]["Overall"] if "validation" in by_split else None},
        others=others,
        tables=(accuracy_table("MMMU by split and subject", by_split),),
        parser="official MMMU parser" if official else f"{PARSER}; open questions as choices",
        num_undecided=num_undecided,
        notes=tuple(notes),
    )


MMMU = Benchmark(
    name="MMMU",
    columns=("MMMU",),
    tsv_files=(TsvFile("MMMU_DEV_VAL", "585e8ad75e73f75dcad265dfd0417d64"),),
    hub_files=(
        HubFiles("MMMU/MMMU", ("dev", "validation")),
        HubFiles("lmms-lab/MMMU", ("dev", "validation")),
    ),
    read_tsv=read_tsv,
    read_parquet=read_parquet,
    score=score,
    lmms_task="mmmu_val",
    num_hub_questions=1050,
)
