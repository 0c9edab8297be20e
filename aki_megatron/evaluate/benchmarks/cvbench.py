"""CV-Bench 2D and 3D: the mean over the sources of each part, not over the rows.

Strict, the headline and the authors' script: the reply is the letter and nothing else. Lenient: the kit's option rule.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.choice_scoring import PARSER, Choice, read_choices
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, ScoreTable, mean, percent

SOURCES = {"ADE20K": "2D", "COCO": "2D", "Omni3D": "3D"}
"""Source of the images -> part."""


def letter_of(answer: str) -> str:
    """Return the letter of an answer that is written "(A)" or "A"."""
    return answer.strip().strip("()")


def read(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's tables, or of nyu-visionx/CV-Bench, whose options are a list."""
    part = record.text("type", "split")
    listed = record.values.get("choices")
    if isinstance(listed, list):
        choices = {chr(ord("A") + number): str(text) for number, text in enumerate(listed)}
    else:
        choices = record.choices()
    return BenchmarkQuestion(
        benchmark="CV-Bench",
        id=f"{part}-{record.text('index', 'idx')}",
        text=record.text("question"),
        answer=letter_of(record.text("answer")),
        choices=choices,
        category=record.text("task", "category", default=""),
        split=part,
        details={"source": record.text("source"), "prompt": record.text("prompt", default="")},
        images=record.images,
    )


def is_strict_hit(reply: str, answer: str) -> bool:
    """Whether the reply is the letter of the answer, with nothing around it."""
    return reply == answer


def aggregate(hits: Sequence[tuple[str, bool]]) -> dict[str, float | None]:
    """Return percent of each source, acc_2d, acc_3d, combined, from (source, is right) of every row.

    A mean is None where one of its sources has no row.
    """
    by_source: dict[str, list[bool]] = defaultdict(list)
    for source, hit in hits:
        by_source[source].append(hit)
    found: dict[str, float | None] = {source: percent(by_source.get(source, [])) for source in SOURCES}
    found |= {source: percent(group) for source, group in by_source.items() if source not in SOURCES}
    parts = {part: [found[s] for s in SOURCES if SOURCES[s] == part] for part in ("2D", "3D")}
    acc_2d, acc_3d = _mean_of(parts["2D"]), _mean_of(parts["3D"])
    return found | {"acc_2d": acc_2d, "acc_3d": acc_3d, "combined": _mean_of([acc_2d, acc_3d])}


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if len(known) == len(values) else None


def source_of(question: BenchmarkQuestion) -> str:
    """Return where the question's image is from."""
    return str(question.details.get("source", ""))


def _by_task(choices: Sequence[Choice], strict: Sequence[bool]) -> ScoreTable:
    tasks = dict.fromkeys((c.prediction.question.split, c.prediction.question.category) for c in choices)
    rows: list[tuple[Any, ...]] = []
    for part, task in sorted(tasks):
        rows_of = [
            (hit, choice.is_hit)
            for hit, choice in zip(strict, choices, strict=True)
            if (choice.prediction.question.split, choice.prediction.question.category) == (part, task)
        ]
        rows.append((f"{part} {task}", percent([s for s, _ in rows_of]), percent([lenient for _, lenient in rows_of])))
    return ScoreTable("CV-Bench by task", ("task", "strict", "lenient"), tuple(rows))


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score CV-Bench."""
    choices = read_choices(predictions, options.rules)
    strict = [not p.error and is_strict_hit(p.reply, p.question.answer) for p in predictions]
    sources = [source_of(prediction.question) for prediction in predictions]
    found = aggregate(list(zip(sources, strict, strict=True)))
    lenient = aggregate([(source, choice.is_hit) for source, choice in zip(sources, choices, strict=True)])
    unknown = sorted(set(sources) - set(SOURCES))
    notes = [f"In no column, because CV-Bench has no such source: {', '.join(map(repr, unknown))}."] if unknown else []
    if missing := [source for source in SOURCES if found[source] is None]:
        notes.append(f"No question of {', '.join(missing)}; the column that needs it is empty.")
    rows = tuple((name, found[name], lenient[name]) for name in found)
    return BenchmarkScore(
        benchmark="CV-Bench",
        columns={"CV2D": found["acc_2d"], "CV3D": found["acc_3d"]},
        others={"CV2D lenient": lenient["acc_2d"], "CV3D lenient": lenient["acc_3d"]},
        tables=(ScoreTable("CV-Bench by source", ("source", "strict", "lenient"), rows), _by_task(choices, strict)),
        parser=f"strict: reply equals the letter; lenient: {PARSER}",
        num_undecided=sum(choice.is_undecided for choice in choices),
        notes=tuple(notes),
    )


CVBENCH = Benchmark(
    name="CV-Bench",
    columns=("CV2D", "CV3D"),
    tsv_files=(
        TsvFile("CV-Bench-2D", "a7cff4cc2857cc237ee2b89e62bccb2d"),
        TsvFile("CV-Bench-3D", "bb94c0d568d652d15b60e001ac40a170"),
    ),
    hub_files=(HubFiles("nyu-visionx/CV-Bench", ("test",)),),
    read_tsv=read,
    read_parquet=read,
    score=score,
    lmms_task="cv_bench",
    num_hub_questions=2638,
)
