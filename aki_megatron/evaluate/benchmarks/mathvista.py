"""MathVista testmini: the answer is read from the reply by rule where it is nothing else, otherwise by a judge.

Kept as VLMEvalKit does it, because published scores have it so: floats must be equal exactly, whatever their precision;
an answer of 0 is not read by rule; of other free-form answers (lists, texts) the word "None" is compared.
"""

import ast
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, JudgeUse, ScoreTable
from aki_megatron.evaluate.extraction.choice import extract_choice
from aki_megatron.evaluate.extraction.rules import Rules
from aki_megatron.evaluate.judges.judge import JudgeRequest
from aki_megatron.evaluate.judges.judging import judge_all
from aki_megatron.evaluate.judges.prompts import JudgePrompts

TRIES = 5

TASKS = (
    "figure question answering", "geometry problem solving", "math word problem", "textbook question answering",
    "visual question answering",
)  # fmt: skip

Extraction = str | int | float


@dataclass(frozen=True)
class Outcome:
    """How a question came out.

    is_prefetched  its answer was read by rule
    """

    question: BenchmarkQuestion
    is_prefetched: bool
    is_hit: bool


def read_tsv(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's table; choices and skills are lists written as text."""
    choices = _list(record.values.get("choices"))
    return _question(
        record, record.text("index"), choices, record.text("answer_option", default=""), record.values, "question"
    )


def read_parquet(record: Record) -> BenchmarkQuestion:
    """Read a row of AI4Math/MathVista; its ``query`` holds hint, question and choices."""
    choices = _list(record.values.get("choices"))
    answer = record.text("answer")
    option = chr(ord("A") + choices.index(answer)) if answer in choices else ""
    metadata = record.values.get("metadata") or {}
    return _question(record, record.text("pid"), choices, option, {**record.values, **metadata}, "query")


def _question(
    record: Record, name: str, choices: list[str], option: str, values: Any, text_column: str
) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        benchmark="MathVista",
        id=name,
        text=record.text(text_column, "question"),
        answer=record.text("answer"),
        choices={chr(ord("A") + number): text for number, text in enumerate(choices)},
        category=str(values.get("task") or ""),
        details={
            "question_type": record.text("question_type"),
            "answer_type": record.text("answer_type"),
            "answer_option": option,
            "skills": _list(values.get("skills")),
        },
        images=record.images,
    )


def _list(value: Any) -> list[str]:
    """Return a list, or the list that a text holds; a text that is no list is one item, None no item."""
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return [value]
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def prefetch(question: BenchmarkQuestion, reply: str, rules: Rules) -> Extraction | None:
    """Return the answer that the reply is, None where the rule does not find it.

    Of a choice question it is the letter, right or wrong; of another one only the right answer is found.
    """
    if question.details["question_type"] == "multi_choice":
        return extract_choice(reply, question.choices, rules)
    value, answer = _comparable(question, reply)
    return value if value is not None and value == answer else None


def is_hit(question: BenchmarkQuestion, extraction: Extraction, rules: Rules) -> bool:
    """Return whether an extracted answer is right."""
    if question.details["question_type"] == "multi_choice":
        letter = extract_choice(str(extraction), question.choices, rules)
        return letter is not None and letter == question.details["answer_option"]
    value, answer = _comparable(question, extraction)
    return value is not None and value == answer


def _comparable(question: BenchmarkQuestion, value: Extraction) -> tuple[Extraction | None, Extraction]:
    """Return a free-form value and the reference answer as they are compared; None for a value of another type."""
    number = {"integer": int, "float": float}.get(question.details["answer_type"])
    if number is None:
        return "None", question.answer
    try:
        found = number(value)
    except (ValueError, OverflowError):
        return None, question.answer
    try:
        return found, number(question.answer)
    except ValueError:
        return found, question.answer


def requests(prediction: Prediction, prompts: JudgePrompts) -> list[JudgeRequest]:
    """Return the tries for one prediction, each with a higher temperature than the one before."""
    prompt = prompts.fill("mathvista", question=prediction.question.text, reply=prediction.reply)
    return [
        JudgeRequest(prediction, prompt, temperature=0.5 * attempt, max_tokens=128, attempt=attempt)
        for attempt in range(TRIES)
    ]


def outcome(prediction: Prediction, rules: Rules, extraction: str = "") -> Outcome:
    """Score a prediction by rule, and otherwise by what a judge extracted ("": nothing)."""
    question = prediction.question
    if prediction.error:
        return Outcome(question, False, False)
    found = prefetch(question, prediction.reply, rules)
    if found:  # 0 is none, see above
        return Outcome(question, True, is_hit(question, found, rules))
    return Outcome(question, False, is_hit(question, extraction, rules))


def aggregate(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """Return tot, prefetch, hit and acc (percent) of Overall, of each task and of each skill."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for item in outcomes:
        for name in ("Overall", item.question.category, *item.question.details["skills"]):
            for place, value in enumerate((1, item.is_prefetched, item.is_hit)):
                counts[name][place] += value
    return {
        name: {"tot": total, "prefetch": found, "hit": hits, "acc": 100 * hits / total}
        for name, (total, found, hits) in counts.items()
        if name
    }


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score MathVista; without a judge, by exact matching alone, which is not the papers' metric."""
    rules, judge = options.rules, options.judge
    outcomes = {p.question.id: outcome(p, rules) for p in predictions}
    undecided = [p for p in predictions if not outcomes[p.question.id].is_prefetched]
    use, notes = JudgeUse(), ["Without a judge only replies that are the answer itself can be right."]
    if judge is not None:
        ask = partial(requests, prompts=options.judge_prompts)
        judgements = judge_all(judge, undecided, ask, str, workers=options.judge_workers)
        for prediction, judgement in zip(undecided, judgements, strict=True):
            outcomes[prediction.question.id] = outcome(prediction, rules, judgement.value or "")
        failed = sum(judgement.value is None for judgement in judgements)
        use, notes = JudgeUse(judge.name, judge.is_heuristic, len(undecided), failed), []
    found = aggregate(list(outcomes.values()))
    order = [*TASKS, *sorted(set(found) - {"Overall", *TASKS})]
    rows: list[tuple[str | float, ...]] = [
        (name, *found[name].values()) for name in ("Overall", *order) if name in found
    ]
    overall = found["Overall"]["acc"]
    columns: dict[str, float | None] = {"MathV": overall}
    if judge is None:
        columns, others = {"MathV": None}, {"MathV by exact matching": overall}
    elif judge.is_heuristic:
        columns, others = {}, {f"MathV by {judge.name}": overall}
    else:
        others = {}
    header = ("task or skill", "questions", "read by rule", "right", "accuracy")
    return BenchmarkScore(
        benchmark="MathVista",
        columns=columns,
        others=dict(others),
        tables=(ScoreTable("MathVista by task and skill", header, tuple(rows)),),
        parser="exact value, else the judge's extraction",
        judge=use,
        num_undecided=len(undecided),
        notes=tuple(notes),
    )


MATHVISTA = Benchmark(
    name="MathVista",
    columns=("MathV",),
    tsv_files=(TsvFile("MathVista_MINI", "f199b98e178e5a2a20e7048f5dcb0464"),),
    hub_files=(HubFiles("AI4Math/MathVista", ("testmini",)),),
    read_tsv=read_tsv,
    read_parquet=read_parquet,
    score=score,
    lmms_task="mathvista_testmini_format",
    num_hub_questions=1000,
)
