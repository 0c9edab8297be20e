"""RealWorldQA: questions about photographs, most with options; the headline is the mean over the questions."""

import re
from collections.abc import Sequence

from aki_megatron.evaluate.benchmarks.benchmark import Benchmark, HubFiles, Record, ScoringOptions, TsvFile
from aki_megatron.evaluate.benchmarks.choice_scoring import PARSER, Choice, accuracies, read_choice
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion, Prediction
from aki_megatron.evaluate.benchmarks.score import BenchmarkScore, ScoreTable
from aki_megatron.evaluate.extraction.rules import Rules

_OPTION = re.compile(r"^([A-Z])[.)]\s+(.*)$")
_INSTRUCTION = re.compile(r"\s*Please answer directly with[^\n]*$")


def read_tsv(record: Record) -> BenchmarkQuestion:
    """Read a row of VLMEvalKit's table."""
    return BenchmarkQuestion(
        benchmark="RealWorldQA",
        id=record.text("index"),
        text=record.text("question"),
        answer=record.text("answer"),
        choices=record.choices(),
        images=record.images,
    )


def read_parquet(record: Record) -> BenchmarkQuestion:
    """Read a row of lmms-lab/RealWorldQA, whose question holds the options and an instruction as lines of text."""
    lines = _INSTRUCTION.sub("", record.text("question").strip()).split("\n")
    options = {match[1]: match[2].strip() for line in lines if (match := _OPTION.match(line.strip()))}
    return BenchmarkQuestion(
        benchmark="RealWorldQA",
        id=record.text("question_id", "id", default="") or record.where.rpartition(" ")[2],
        text="\n".join(line for line in lines if not _OPTION.match(line.strip())).strip(),
        answer=record.text("answer").strip(),
        choices=options,
        details={} if options else {"is_open": True},
        images=record.images,
    )


def read_reply(prediction: Prediction, rules: Rules) -> Choice:
    """Read the option of a reply; a question of the parquet files without options asks for its answer itself."""
    question = prediction.question
    if not question.details.get("is_open"):
        return read_choice(prediction, rules)
    # the kit's table has no such questions, so it has no rule; a reply that states the answer and no more is right
    stated = prediction.reply.strip().strip(".").lower() == question.answer.strip().strip(".").lower()
    return Choice(prediction, "A", "A" if stated and not prediction.error else None)


def score(predictions: Sequence[Prediction], options: ScoringOptions) -> BenchmarkScore:
    """Score RealWorldQA."""
    choices = [read_reply(prediction, options.rules) for prediction in predictions]
    num_open = sum(bool(prediction.question.details.get("is_open")) for prediction in predictions)
    found = accuracies(choices)
    notes = (f"{num_open} questions have no options; their replies must equal the answer.",) if num_open else ()
    return BenchmarkScore(
        benchmark="RealWorldQA",
        columns={"RWQA": found["Overall"]},
        tables=(ScoreTable("RealWorldQA", ("category", "accuracy"), tuple(found.items())),),
        parser=PARSER,
        num_undecided=sum(choice.is_undecided for choice in choices),
        notes=notes,
    )


REALWORLDQA = Benchmark(
    name="RealWorldQA",
    columns=("RWQA",),
    tsv_files=(TsvFile("RealWorldQA", "4de008f55dc4fd008ca9e15321dc44b7"),),
    hub_files=(HubFiles("lmms-lab/RealWorldQA", ("test",)), HubFiles("xai-org/RealworldQA", ("test",))),
    read_tsv=read_tsv,
    read_parquet=read_parquet,
    score=score,
    lmms_task="realworldqa",
    num_hub_questions=765,
)
