"""MM-Vet: open questions, each needing some of six capabilities; a judge scores every reply from 0 to 1."""

from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, JudgeUse, ScoreTable
from aki_megatron.evaluate.judges.judge import JudgeRequest
from aki_megatron.evaluate.judges.judging import Judgement, judge_all
from aki_megatron.evaluate.judges.prompts import JudgePrompts

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
TRIES = 5


def read_tsv(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's table."""
    return _question(record, record.text("index"), record.text("category"))


def read_parquet(record: Record) -> BenchmarkQuestion:
    """Read a row of lmms-lab/MMVet."""
    return _question(record, record.text("question_id"), record.text("capability"))


def _question(record: Record, name: str, category: str) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        benchmark="MM-Vet",
        id=name,
        text=record.text("question"),
        answer=record.text("answer"),
        category=category,
        images=record.images,
    )


def read_grade(reply: str) -> float | None:
    """Return the number that a judge's reply is, None where it is no number or outside of 0 to 1.

    As in the kit, "nan" is accepted, and makes every mean that contains it nan.
    """
    try:
        grade = float(reply)
    except ValueError:
        return None
    return None if grade < 0 or grade > 1 else grade


def requests(prediction: Prediction, prompts: JudgePrompts) -> list[JudgeRequest]:
    """Return the tries for one prediction, each with a higher temperature than the one before."""
    answer = prediction.question.answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = prompts.fill("mmvet", question=prediction.question.text, answer=answer, reply=prediction.reply)
    return [
        JudgeRequest(prediction, prompt, temperature=0.5 * attempt, max_tokens=8, attempt=attempt)
        for attempt in range(TRIES)
    ]


def aggregate(grades: Sequence[tuple[str, float]]) -> dict[str, Any]:
    """Return scores (percent) and totals of the capabilities and Overall, and scores of the combinations.

    grades  (category, grade) of every question. As in the kit, capabilities and combinations share one table: a
            question that needs a single capability counts twice for it.
    """
    sums: dict[str, float] = defaultdict(float)
    totals: dict[str, int] = defaultdict(int)
    combinations = dict.fromkeys(category.replace(",", "_") for category, _ in grades)
    for category, grade in grades:
        named = [capability for capability in CAPABILITIES if capability in category]
        for name in (*named, "Overall", category.replace(",", "_")):
            sums[name] += grade
            totals[name] += 1
    scores = {name: 100 * sums[name] / totals[name] if totals[name] else None for name in (*CAPABILITIES, "Overall")}
    return {
        "scores": scores,
        "totals": {name: totals[name] for name in (*CAPABILITIES, "Overall")},
        "combinations": {name: 100 * sums[name] / totals[name] for name in (*combinations, "Overall")},
    }


def grade_of(judgement: Judgement[float]) -> float:
    """Return the grade, 0 where the judge gave none."""
    return 0.0 if judgement.value is None else judgement.value


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score MM-Vet; without a judge it has no score."""
    if options.judge is None:
        notes = ("MM-Vet needs a judge; give one with --judge.",)
        return BenchmarkScore(benchmark="MM-Vet", columns={"MM-Vet": None}, judge=JudgeUse("none"), notes=notes)
    ask = partial(requests, prompts=options.judge_prompts)
    judgements = judge_all(options.judge, predictions, ask, read_grade, workers=options.judge_workers)
    pairs = zip(predictions, judgements, strict=True)
    found = aggregate([(prediction.question.category, grade_of(judgement)) for prediction, judgement in pairs])
    num_failed = sum(judgement.value is None for judgement in judgements)
    capabilities = tuple((name, found["scores"][name], found["totals"][name]) for name in (*CAPABILITIES, "Overall"))
    combinations = tuple(found["combinations"].items())
    known = set(CAPABILITIES)
    unknown = sorted({c for p in predictions for c in p.question.category.split(",") if c.strip() not in known})
    headline = {"MM-Vet": found["scores"]["Overall"]}
    is_heuristic = options.judge.is_heuristic
    return BenchmarkScore(
        benchmark="MM-Vet",
        columns={} if is_heuristic else headline,
        others={f"MM-Vet by {options.judge.name}": headline["MM-Vet"]} if is_heuristic else {},
        tables=(
            ScoreTable("MM-Vet by capability", ("capability", "score", "questions"), capabilities),
            ScoreTable("MM-Vet by combination", ("capabilities", "score"), combinations),
        ),
        parser="the judge's number, 0 to 1",
        judge=JudgeUse(options.judge.name, is_heuristic, len(predictions), num_failed),
        notes=(f"No capabilities of MM-Vet: {', '.join(unknown)}.",) if unknown else (),
    )


MMVET = Benchmark(
    name="MM-Vet",
    columns=("MM-Vet",),
    tsv_files=(TsvFile("MMVet", "748aa6d4aa9d4de798306a63718455e3"),),
    hub_files=(HubFiles("lmms-lab/MMVet", ("test",)),),
    read_tsv=read_tsv,
    read_parquet=read_parquet,
    score=score,
    lmms_task="mmvet",
    num_hub_questions=218,
)
