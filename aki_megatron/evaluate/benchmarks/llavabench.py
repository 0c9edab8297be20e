"""LLaVA-Bench in the wild: a judge gives the reference answer and the model's reply 1 to 10 each.

The score is the ratio of the two means in percent, not the mean of ratios. A judgement without two numbers is -1 and -1
in the kit, which averages it in: the table has both figures, the headline leaves such judgements out.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, JudgeUse, ScoreTable
from aki_megatron.evaluate.judges.judge import JudgeRequest
from aki_megatron.evaluate.judges.judging import judge_all
from aki_megatron.evaluate.judges.prompts import JudgePrompts

CATEGORIES = ("conv", "detail", "complex")
FAILED = (-1.0, -1.0)
"""Scores of a judgement without two numbers."""
TEMPERATURE = 0.2

Grade = tuple[float, float]
"""Scores of the reference answer and of the model's reply."""


def read(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's table or of lmms-lab/llava-bench-in-the-wild."""
    return BenchmarkQuestion(
        benchmark="LLaVA-Bench",
        id=record.text("index", "question_id"),
        text=record.text("question"),
        answer=record.text("gpt4_ans", "gpt_answer"),
        category=record.text("category").removeprefix("llava_bench_"),
        details={"caption": record.text("caption")},
        images=record.images,
    )


def read_grades(reply: str) -> Grade | None:
    """Return the two numbers of the first line, separated by one blank or one comma; None for anything else."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return None
    try:
        return float(parts[0]), float(parts[1])
    except ValueError:
        return None


def requests(prediction: Prediction, prompts: JudgePrompts) -> list[JudgeRequest]:
    """Return the one request about a prediction."""
    question = prediction.question
    caption = str(question.details.get("caption", ""))
    prompt = prompts.fill(
        "llavabench", caption=caption, question=question.text, answer=question.answer, reply=prediction.reply
    )
    return [JudgeRequest(prediction, prompt, prompts.llavabench_system, temperature=TEMPERATURE)]


def aggregate(grades: Sequence[tuple[str, Grade]]) -> dict[str, dict[str, float]]:
    """Return relative, relative_1_decimal, model, reference (percent) of ``overall`` and of each category."""
    categories = dict.fromkeys(category for category, _ in grades)
    groups = {"overall": [grade for _, grade in grades]}
    groups |= {name: [grade for category, grade in grades if category == name] for name in categories}
    return {name: _means(group) for name, group in groups.items() if group}


def _means(grades: Sequence[Grade]) -> dict[str, float]:
    # as in the kit, a grade of nan is left out of its mean
    reference, model = (_nan_mean([grade[place] for grade in grades]) for place in (0, 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = model / reference * 100
    return {
        "relative": float(relative),
        "relative_1_decimal": float(np.round(relative, 1)),
        "model": float(model * 10),
        "reference": float(reference * 10),
    }


def _nan_mean(values: Sequence[float]) -> np.float64:
    known = np.array([value for value in values if value == value], dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return known.mean() if len(known) else np.float64("nan")


def aggregate_both(grades: Sequence[tuple[str, Grade | None]]) -> dict[str, Any]:
    """Return failures_averaged_in (what the kit prints), failures_excluded, and n_failed."""
    return {
        "failures_averaged_in": aggregate([(category, grade or FAILED) for category, grade in grades]),
        "failures_excluded": aggregate([(category, grade) for category, grade in grades if grade is not None]),
        "n_failed": sum(grade is None for _, grade in grades),
    }


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score LLaVA-Bench; without a judge it has no score."""
    name = "LLaVA-Bench"
    if options.judge is None:
        notes = ("LLaVA-Bench needs a judge; give one with --judge.",)
        return BenchmarkScore(benchmark=name, columns={"LLaVA": None}, judge=JudgeUse("none"), notes=notes)
    ask = partial(requests, prompts=options.judge_prompts)
    judgements = judge_all(options.judge, predictions, ask, read_grades, workers=options.judge_workers)
    categories = [prediction.question.category for prediction in predictions]
    found = aggregate_both([(c, judgement.value) for c, judgement in zip(categories, judgements, strict=True)])
    kit, usable = found["failures_averaged_in"], found["failures_excluded"]
    order = dict.fromkeys(("overall", *CATEGORIES, *categories))
    empty: dict[str, float] = {}
    rows = tuple(
        (
            group,
            usable.get(group, empty).get("relative"),
            kit[group]["relative"],
            usable.get(group, empty).get("model"),
            usable.get(group, empty).get("reference"),
        )
        for group in order
        if group in kit
    )
    headline = usable.get("overall", empty).get("relative")
    is_heuristic = options.judge.is_heuristic
    unknown = sorted(set(categories) - set(CATEGORIES))
    others = {f"LLaVA by {options.judge.name}": headline} if is_heuristic else {}
    if found["n_failed"] and not is_heuristic:
        others["LLaVA, failures averaged in"] = kit["overall"]["relative"]
    header = ("category", "score", "failures averaged in", "model", "reference")
    return BenchmarkScore(
        benchmark=name,
        columns={} if is_heuristic else {"LLaVA": headline},
        others=others,
        tables=(ScoreTable("LLaVA-Bench by category", header, rows),),
        parser="two numbers in the judge's first line",
        judge=JudgeUse(options.judge.name, is_heuristic, len(predictions), found["n_failed"]),
        notes=(f"No categories of LLaVA-Bench: {', '.join(unknown)}.",) if unknown else (),
    )


LLAVABENCH = Benchmark(
    name="LLaVA-Bench",
    columns=("LLaVA",),
    tsv_files=(TsvFile("LLaVABench", "d382a093f749a697820d3dadd61c8428"),),
    hub_files=(HubFiles("lmms-lab/llava-bench-in-the-wild", ("train", "test")),),
    read_tsv=read,
    read_parquet=read,
    score=score,
    lmms_task="llava_in_the_wild",
    num_hub_questions=60,
)
