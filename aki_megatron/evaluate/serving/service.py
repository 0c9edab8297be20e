"""The thread that owns the model: it answers requests in one running batch, and outlives whatever fails in it.

Requests come from any thread and join the batch in their order. A request that is cancelled leaves before the next
token. When a step fails (out of memory), the requests of the batch are told so and a new batch begins.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from aki_megatron.errors import DataError, UserError
from aki_megatron.evaluate.answering import Answerer, Request
from aki_megatron.evaluate.model_loading import LoadedModel
from aki_megatron.model.stage import Stage

logger = logging.getLogger(__name__)

OnDone = Callable[[Request, Exception | None], None]
"""Gets a request that has ended, with what it failed at if it did; called on the model's thread, must not block."""


class QueueFullError(Exception):
    """As many requests wait as may."""


class StoppedError(Exception):
    """The service has stopped, and answers nothing any more."""


class Load(NamedTuple):
    """What a service does at this moment."""

    running: int
    waiting: int
    answered: int


@dataclass(frozen=True)
class _Job:
    request: Request
    on_done: OnDone


@dataclass(frozen=True)
class _Call:
    """A function of the model, to be run between two steps."""

    function: Callable[[Stage], Any]
    on_done: Callable[[Any, Exception | None], None]


class AnsweringService:
    """Answer requests with one model on one thread. ``start`` it before the first request, ``stop`` it at the end."""

    def __init__(
        self, model: LoadedModel, *, max_sequences: int = 16, max_waiting: int = 256, max_prefill_tokens: int = 8192
    ) -> None:
        """Answer up to ``max_sequences`` requests at a time, while up to ``max_waiting`` others wait.

        max_prefill_tokens  padded positions of the prompts that are read in one pass
        """
        self.model = model
        self._settings = {"max_sequences": max_sequences, "max_prefill_tokens": max_prefill_tokens}
        self._max_sequences, self._max_waiting = max_sequences, max_waiting
        self._changed = threading.Condition()
        self._incoming: deque[_Job] = deque()
        self._calls: deque[_Call] = deque()
        self._active: dict[int, _Job] = {}  # by id of their request: those in the batch
        self._num_answered = 0
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """Cancel all requests and wait for the thread to end, ``timeout`` seconds at most."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and not self._is_stopping

    @property
    def load(self) -> Load:
        """Return how many requests run and wait."""
        with self._changed:
            return Load(len(self._active), len(self._incoming), self._num_answered)

    def submit(self, request: Request, on_done: OnDone) -> None:
        """Queue a request; ``on_done`` is called once, whatever becomes of it.

        Raises QueueFullError where too many wait, StoppedError where the service has stopped.
        """
        with self._changed:
            if not self.is_alive:
                raise StoppedError
            if len(self._incoming) >= self._max_waiting + self._max_sequences - len(self._active):
                raise QueueFullError
            self._incoming.append(_Job(request, on_done))
            self._changed.notify_all()

    def call(self, function: Callable[[Stage], Any], on_done: Callable[[Any, Exception | None], None]) -> None:
        """Run a function of the model on its thread, between two tokens; ``on_done`` gets its result or its error.

        Raises QueueFullError and StoppedError as ``submit`` does.
        """
        with self._changed:
            if not self.is_alive:
                raise StoppedError
            if len(self._calls) >= self._max_waiting + 1:
                raise QueueFullError
            self._calls.append(_Call(function, on_done))
            self._changed.notify_all()

    def _run(self) -> None:
        answerer = Answerer(self.model.stage, self.model.template.tokenizer, **self._settings)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_stopping or self._active or self._incoming or self._calls)
                if self._is_stopping:
                    break
            try:
                self._make_calls()
                self._admit(answerer)
                for request in answerer.step():
                    self._end(request, None)
            except Exception as error:
                logger.exception("a step failed; %d requests are given up, the others go on", len(self._active))
                self._abandon(error)
                answerer = Answerer(self.model.stage, self.model.template.tokenizer, **self._settings)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        self._abandon(StoppedError())

    def _make_calls(self) -> None:
        while self._calls:
            call = self._calls.popleft()
            try:
                result, error = call.function(self.model.stage), None
            except Exception as raised:
                if not isinstance(raised, UserError):
                    logger.exception("a function of the model failed")
                result, error = None, raised
            _notify(call.on_done, result, error)

    def _admit(self, answerer: Answerer) -> None:
        """Hand the batch as many requests as have a place in it; end those that were cancelled while they waited."""
        with self._changed:
            waiting = list(self._incoming)
            self._incoming.clear()
            free = self._max_sequences - len(self._active)
            chosen = [job for job in waiting if not job.request.is_cancelled][:free]
            cancelled = [job for job in waiting if job.request.is_cancelled]
            taken = {id(job) for job in (*chosen, *cancelled)}
            self._incoming.extend(job for job in waiting if id(job) not in taken)
            self._active.update({id(job.request): job for job in (*chosen, *cancelled)})
        for job in cancelled:
            job.request.finish_reason = "cancelled"
            self._end(job.request, None)
        for job in chosen:
            try:
                answerer.submit(job.request)
            except DataError as error:
                self._end(job.request, error)

    def _end(self, request: Request, error: Exception | None) -> None:
        with self._changed:
            job = self._active.pop(id(request))
            self._num_answered += error is None and request.finish_reason != "cancelled"
        _notify(job.on_done, request, error)

    def _abandon(self, error: Exception) -> None:
        """End all requests of the batch; when stopping also those that wait."""
        with self._changed:
            jobs = list(self._active.values())
            self._active.clear()
            if self._is_stopping:
                jobs += self._incoming
                self._incoming.clear()
                calls, self._calls = list(self._calls), deque()
            else:
                calls = []
        for job in jobs:
            _notify(job.on_done, job.request, error)
        for call in calls:
            _notify(call.on_done, None, error)


def _notify(on_done: Callable[[Any, Exception | None], None], result: Any, error: Exception | None) -> None:
    """Call ``on_done``; what it raises (its event loop has ended) must not end the model's thread."""
    try:
        on_done(result, error)
    except Exception:
        logger.debug("nobody waits for an answer any more", exc_info=True)
