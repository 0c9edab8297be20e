"""Which questions a run on benchmarks still has to answer, and how its processes share them.

Questions are claimed in blocks, one after another, by whichever process can take more: a slow one claims fewer and
holds up nobody. The plan holds only what has no prediction yet, so any number of processes may go on with a folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aki_megatron.evaluate.benchmark_folder import begin_benchmark
from aki_megatron.evaluate.benchmarks.files import QuestionSet
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion

MAX_BLOCK = 32
"""Most questions that are claimed at a time."""

BLOCKS_PER_WORKER = 8
"""Blocks are so small that each worker gets this many on average: at the end none waits long for the others."""


@dataclass(frozen=True)
class WorkPlan:
    """The questions without a prediction when a start begins.

    total  questions of this run, with those that were answered before
    """

    questions: tuple[BenchmarkQuestion, ...]
    total: int
    block_size: int

    @property
    def num_answered_before(self) -> int:
        """Questions that earlier starts have answered."""
        return self.total - len(self.questions)

    def block(self, number: int) -> tuple[BenchmarkQuestion, ...] | None:
        """Return the questions of a block, counted from 0; None after the last."""
        first = number * self.block_size
        return self.questions[first : first + self.block_size] if first < len(self.questions) else None

    def claims(self, next_number: Callable[[], int]) -> Callable[[], tuple[BenchmarkQuestion, ...] | None]:
        """Return what claims the next block; ``next_number`` counts over all processes."""
        return lambda: self.block(next_number())


def make_plan(
    folder: Path,
    found: Sequence[QuestionSet],
    *,
    profile: str,
    model: str,
    max_new_tokens: int,
    per_benchmark: int = 0,
    num_workers: int = 1,
) -> WorkPlan:
    """Record in a folder what is asked, and return what is still to be answered.

    per_benchmark  about so many questions of each; 0: all

    Raises DataError where the folder holds predictions by another model, profile or file.
    """
    pending: list[BenchmarkQuestion] = []
    total = 0
    for each in found:
        asked = choose_questions(each.questions, per_benchmark)
        total += len(asked)
        open_ids = {
            question.id
            for question in begin_benchmark(folder, each, profile=profile, model=model, max_new_tokens=max_new_tokens)
        }
        pending += [question for question in asked if question.id in open_ids]
    block_size = max(1, min(MAX_BLOCK, len(pending) // (num_workers * BLOCKS_PER_WORKER)))
    return WorkPlan(tuple(pending), total, block_size)


def choose_questions(questions: Sequence[BenchmarkQuestion], count: int) -> list[BenchmarkQuestion]:
    """Return about ``count`` questions, evenly spaced over the file; 0: all.

    Questions that are scored together (``group``: the rotations of MMBench, the pairs of MME) stay together.
    """
    groups: dict[tuple[str, str], list[BenchmarkQuestion]] = {}
    for number, question in enumerate(questions):
        key = ("group", question.group) if question.group else ("single", str(number))
        groups.setdefault(key, []).append(question)
    listed = list(groups.values())
    kept = len(listed)
    if count:
        kept = min(kept, max(1, round(count * len(listed) / len(questions))))
    chosen = {question.id for number in range(kept) for question in listed[number * len(listed) // kept]}
    return [question for question in questions if question.id in chosen]
