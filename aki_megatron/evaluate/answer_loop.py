"""Keep the queue of a model full with questions, and hand on each answer as soon as it exists."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist

from aki_megatron.errors import DataError
from aki_megatron.evaluate.answering import Answerer, Request
from aki_megatron.evaluate.benchmarks.question import Prediction
from aki_megatron.evaluate.question_supply import Prepared
from aki_megatron.parallel.topology import Topology


class Supply(Protocol):
    """Where the questions come from (question_supply.py)."""

    def take(self, count: int, *, wait: bool) -> list[Prepared] | None:
        """Return up to ``count`` questions, at least one if ``wait``; None when none is left."""
        ...


class TensorRanks:
    """The processes that hold one model together; tensor rank 0 reads the questions for all."""

    def __init__(self, topology: Topology | None = None) -> None:
        """Without a topology: one process alone."""
        self._topology = topology if topology is not None and topology.tensor > 1 else None

    @property
    def is_leader(self) -> bool:
        """Whether this process reads questions and gets the answers."""
        return self._topology is None or self._topology.tensor_rank == 0

    def share(self, questions: list[Prepared] | None) -> list[Prepared] | None:
        """Return the leader's questions on all ranks; collective."""
        if self._topology is None:
            return questions
        content = [questions]
        source = dist.get_global_rank(self._topology.tensor_group, 0)
        dist.broadcast_object_list(content, source, self._topology.tensor_group, device=self._topology.device)
        return content[0]


@dataclass(frozen=True)
class AnswerSettings:
    """What a prediction is made with."""

    profile: str
    max_new_tokens: int
    batch_size: int


def answer_questions(
    answerer: Answerer,
    supply: Supply,
    settings: AnswerSettings,
    on_answers: Callable[[Sequence[Prediction]], None],
    ranks: TensorRanks | None = None,
) -> None:
    """Answer all questions of a supply greedily.

    on_answers  gets the answers that have just ended, maybe none, after every token; on the leader

    With several tensor ranks it is collective: all of them call it, and the leader's supply counts.
    """
    ranks = ranks or TensorRanks()
    running: dict[int, tuple[Request, Prepared]] = {}
    goes_on = True
    while goes_on or running:
        refused: list[Prediction] = []
        num_free = settings.batch_size - len(running)  # a place that has got free is taken before the next token
        if goes_on and num_free > 0:
            taken = ranks.share(supply.take(num_free, wait=not running) if ranks.is_leader else None)
            goes_on = taken is not None
            refused = [answer for each in taken or () if (answer := _submit(each, answerer, settings, running))]
        ended = [running.pop(id(request)) for request in answerer.step()]
        answers = [Prediction(of.question, request.text.strip(), profile=settings.profile) for request, of in ended]
        if ranks.is_leader:
            on_answers([*refused, *answers])


def _submit(
    prepared: Prepared, answerer: Answerer, settings: AnswerSettings, running: dict[int, tuple[Request, Prepared]]
) -> Prediction | None:
    """Queue a question; return the prediction of one that cannot be asked."""
    error = prepared.error
    if prepared.prompt is not None:
        request = Request(prepared.prompt, settings.max_new_tokens)
        try:
            answerer.submit(request)
        except DataError as refused:
            error = str(refused)
        else:
            running[id(request)] = (request, prepared)
            return None
    return Prediction(prepared.question, "", error=error, profile=settings.profile)
