"""Read prompts ahead of the model: threads read and decode the images of the questions that come next."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from aki_megatron.data.bad_samples import sample_errors
from aki_megatron.data.media import Decoders
from aki_megatron.data.template import Template
from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmark_conversation import to_conversation
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion
from aki_megatron.evaluate.prompts import PromptProfile
from aki_megatron.evaluate.runner import read_prompt
from aki_megatron.types import Sample


class Prepared(NamedTuple):
    """A question and its prompt, or why it has none."""

    question: BenchmarkQuestion
    prompt: Sample | None
    error: str = ""


@dataclass(frozen=True)
class PromptReader:
    """Make the prompt of a question: its text by a profile, its image decoded. Safe to call from several threads."""

    template: Template
    profile: PromptProfile
    decoders: Decoders

    def __call__(self, question: BenchmarkQuestion) -> Prepared:
        """Return the prompt, or what is wrong with the question."""
        try:
            with sample_errors(f"{question.benchmark} question {question.id}"):
                conversation = to_conversation(question, self.profile)
                return Prepared(question, read_prompt(conversation, self.template, self.decoders))
        except DataError as error:
            return Prepared(question, None, str(error))


class QuestionSupply:
    """The prompts of the questions that this process answers, in the order in which it claimed them."""

    def __init__(
        self,
        claim: Callable[[], Sequence[BenchmarkQuestion] | None],
        read: Callable[[BenchmarkQuestion], Prepared],
        *,
        num_threads: int,
        num_ahead: int,
    ) -> None:
        """Start the threads; nothing is claimed before ``take``.

        claim      returns the next questions, None when there are none left; called in the thread of ``take``
        num_ahead  questions whose prompts are read before they are asked for
        """
        self._claim: Callable[[], Sequence[BenchmarkQuestion] | None] | None = claim
        self._read = read
        self._num_ahead = num_ahead
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="read question")
        self._reading: deque[Future[Prepared]] = deque()

    def take(self, count: int, *, wait: bool) -> list[Prepared] | None:
        """Return up to ``count`` prompts, those that are ready; None when no question is left.

        wait  return at least one
        """
        self._read_ahead()
        if not self._reading:
            return None
        taken: list[Prepared] = []
        while self._reading and len(taken) < count and (self._reading[0].done() or (wait and not taken)):
            taken.append(self._reading.popleft().result())
        return taken

    def close(self) -> None:
        """End the threads; prompts that nobody took are forgotten."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self) -> None:
        while self._claim is not None and len(self._reading) < self._num_ahead:
            questions = self._claim()
            if questions is None:
                self._claim = None
                return
            self._reading.extend(self._threads.submit(self._read, question) for question in questions)
