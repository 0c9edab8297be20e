"""SEED-Bench, image part: four options, nine categories; the headline is the mean over the questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.choice_scoring import PARSER, accuracies, accuracy_table, read_choices
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore

CATEGORIES = {
    "1": "Scene Understanding",
    "2": "Instance Identity",
    "5": "Instances Counting",
    "6": "Spatial Relation",
    "7": "Instance Interaction",
    "8": "Visual Reasoning",
    "9": "Text Understanding",
}
"""question_type_id -> name, where all versions of SEED-Bench agree."""

ATTRIBUTES, LOCATION = "Instance Attributes", "Instance Location"


def read_tsv(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's table."""
    return BenchmarkQuestion(
        benchmark="SEED-Bench",
        id=record.text("index"),
        text=record.text("question"),
        answer=record.text("answer"),
        choices=record.choices(),
        category=record.text("category", default=""),
        images=record.images,
    )


def read_parquet(record: Record) -> BenchmarkQuestion | None:
    """Read a row of lmms-lab/SEED-Bench; None for one about a video."""
    if record.text("data_type", default="image") != "image":
        return None
    type_id = record.text("question_type_id")
    return BenchmarkQuestion(
        benchmark="SEED-Bench",
        id=record.text("question_id"),
        text=record.text("question"),
        answer=record.text("answer"),
        choices={letter: record.text(f"choice_{letter.lower()}") for letter in "ABCD"},
        category=CATEGORIES.get(type_id, type_id),
        images=record.images,
    )


def finish(questions: Sequence[BenchmarkQuestion], path: Path) -> Sequence[BenchmarkQuestion]:
    """Name types 3 and 4, whose order differs between versions: by far more questions are about attributes."""
    del path
    counts = Counter(question.category for question in questions)
    more = "3" if counts["3"] > counts["4"] else "4"
    names = {"3": LOCATION, "4": LOCATION} | {more: ATTRIBUTES}
    return [replace(question, category=names.get(question.category, question.category)) for question in questions]


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score SEED-Bench."""
    choices = read_choices(predictions, options.rules)
    found = accuracies(choices)
    return BenchmarkScore(
        benchmark="SEED-Bench",
        columns={"SEED": found["Overall"]},
        tables=(accuracy_table("SEED-Bench by category", {"accuracy": found}),),
        parser=PARSER,
        num_undecided=sum(choice.is_undecided for choice in choices),
    )


SEED = Benchmark(
    name="SEED-Bench",
    columns=("SEED",),
    tsv_files=(TsvFile("SEEDBench_IMG", "68017231464752261a2526d6ca3a10c0", "benchmarks/SEEDBench"),),
    hub_files=(HubFiles("lmms-lab/SEED-Bench", ("test",)),),
    read_tsv=read_tsv,
    read_parquet=read_parquet,
    finish=finish,
    score=score,
    lmms_task="seedbench",
    num_hub_questions=14232,
)
