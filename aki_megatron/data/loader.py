"""Batches of one data rank, step by step, decoded ahead: by background processes, or by a thread of this one.

What a step holds is decided by steps.py; this decodes it, in order, counts what was bad, and notes what was consumed.
"""

import os
import queue
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from aki_megatron.data.bad_samples import BadSample, BadSampleBudget
from aki_megatron.data.batch import collate
from aki_megatron.data.batch_planner import BatchPlanner, MicroPlan, State, StepPlan
from aki_megatron.data.sample_stream import SampleStream
from aki_megatron.errors import DataError, UserError
from aki_megatron.types import Batch, Sample

_PATIENCE_SECONDS = 0.1
_WORD = 2**64


@dataclass(frozen=True)
class LoadedMicro:
    """A micro-batch, a number that stands for the samples in it and their places, and the bad elements met."""

    batch: Batch
    consumed: int
    samples: int
    faults: tuple[BadSample, ...]

    def pin_memory(self) -> "LoadedMicro":
        """The same with its tensors in page-locked memory; torch's DataLoader calls it."""
        return LoadedMicro(self.batch.pin_memory(), self.consumed, self.samples, self.faults)


@dataclass(frozen=True)
class LoadedStep:
    """One optimizer step of one data rank.

    consumed  sum modulo 2^64 over the samples of a hash of (row of the step, place in the row, key): over all data
              ranks it adds up to the same number however many there are
    state     from which the next step goes on
    """

    batches: Sequence[Batch]
    consumed: int
    samples: int
    state: State


class MicroBatches(Dataset[LoadedMicro | UserError]):
    """Plans to micro-batches; what background processes run. ``sequence_length``: fixed width of rows, None: the longest."""

    def __init__(
        self, streams: Sequence[SampleStream], *, pad_id: int, image_size: int, sequence_length: int | None
    ) -> None:
        self._streams = streams
        self._pad_id = pad_id
        self._image_size = image_size
        self._row_tokens = sequence_length

    def __getitem__(self, plan: MicroPlan) -> LoadedMicro | UserError:
        """Decode. A UserError is handed over: raised in a background process it would lose its words."""
        try:
            return self._load(plan)
        except UserError as error:
            return error

    def _load(self, plan: MicroPlan) -> LoadedMicro:
        stream = self._streams[plan.phase]
        rows: list[list[Sample]] = []
        faults: list[BadSample] = []
        consumed = samples = 0
        for row, numbers in plan.rows:
            rows.append([])
            for place, number in enumerate(numbers):
                drawn = stream.sample(number, replace_images=self._row_tokens is None)
                faults += drawn.faults
                if drawn.sample is not None:
                    rows[-1].append(drawn.sample)
                    consumed += _hash(row, place, drawn.sample.key)
                    samples += 1
        batch = collate(
            rows, pad_id=self._pad_id, image_size=self._image_size, sequence_length=self._row_tokens, bad=len(faults)
        )
        return LoadedMicro(batch, consumed % _WORD, samples, tuple(faults))


def _hash(row: int, place: int, key: str) -> int:
    return int.from_bytes(blake2b(f"{row}\x1f{place}\x1f{key}".encode(), digest_size=8).digest(), "little")


class Loader:
    """The steps of one data rank."""

    def __init__(
        self,
        planner: BatchPlanner,
        micro_batches: MicroBatches,
        *,
        losses: BadSampleBudget,
        workers: int = 0,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        """``workers`` background processes decode; 0: a thread of this process does."""
        assert prefetch_steps >= 1 and workers >= 0, (prefetch_steps, workers)
        self.planner = planner
        self.micro_batches = micro_batches
        self.losses = losses
        self.workers = workers
        self.prefetch_steps = prefetch_steps
        self.pin_memory = pin_memory
        self._last: LoadedStep | None = None
        self._work: list[_Work] = []

    def steps(self, start: int, state: State | None = None) -> Iterator[LoadedStep]:
        """Steps start, start+1, ... without end; ``state`` is that of step ``start - 1``.

        Preparation starts at once. What goes wrong in the background is raised here, at the step it belongs to;
        BadSampleBudgetExceeded when more was bad than ``losses`` allow.
        """
        self._work = [work for work in self._work if work.thread.is_alive()]
        self._work.append(_Work(self, start, state))
        return _Prefetched(self._work[-1], self._hand_out)

    def _hand_out(self, plan: StepPlan, micros: Sequence[LoadedMicro]) -> LoadedStep:
        samples = sum(micro.samples for micro in micros)
        self.losses.add(samples, (fault for micro in micros for fault in micro.faults))
        consumed = sum(micro.consumed for micro in micros) % _WORD
        self._last = LoadedStep([micro.batch for micro in micros], consumed, samples, plan.after)
        return self._last

    def last(self) -> LoadedStep:
        """The step that was handed out last."""
        assert self._last is not None, "no step was handed out yet"
        return self._last

    def close(self) -> None:
        """Stop all background work and wait for it. The loader can be used again."""
        for work in self._work:
            work.cancelled.set()
        for work in self._work:
            work.thread.join()
        self._work = []

    def decoded(self, plans: Iterator[StepPlan]) -> Iterator[tuple[StepPlan, list[LoadedMicro]]]:
        """Every plan with its micro-batches, in order."""
        if not self.workers:
            for plan in plans:
                micros = [_checked(self.micro_batches[micro]) for micro in plan.micros]
                yield plan, [micro.pin_memory() for micro in micros] if self.pin_memory else micros
            return
        waiting: deque[StepPlan] = deque()

        def planned() -> Iterator[MicroPlan]:
            for plan in plans:
                waiting.append(plan)
                yield from plan.micros

        count = self.planner.micro_batches
        # torch advises against more processes than cores; how many is the user's choice
        warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
        ready = iter(
            DataLoader(
                self.micro_batches,
                sampler=_Plans(planned()),
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=max(1, -(-self.prefetch_steps * count // self.workers)),
                pin_memory=self.pin_memory,
                # rows of the sources are shared with the parent's memory, not copied
                multiprocessing_context="fork",
                worker_init_fn=_begin_worker,
            )
        )
        while True:
            try:
                micros = [_checked(next(ready)) for _ in range(count)]
            except (EOFError, ConnectionError, RuntimeError) as error:
                raise DataError(
                    "A background process that decodes pictures ended without a word (killed? out of memory?): "
                    f"{str(error).splitlines()[0] if str(error) else type(error).__name__}. "
                    "Lower data.num_workers or data.prefetch_steps; data.num_workers 0 decodes in this process."
                ) from error
            yield waiting.popleft(), micros


def _checked(micro: LoadedMicro | UserError) -> LoadedMicro:
    if isinstance(micro, UserError):
        raise micro
    return micro


class _Plans:
    """A sampler: torch asks it for the next thing to load."""

    def __init__(self, plans: Iterator[MicroPlan]) -> None:
        self._plans = plans

    def __iter__(self) -> Iterator[MicroPlan]:
        return self._plans


def _begin_worker(_worker: int) -> None:
    """Leave signals to the rank: a scheduler may send SIGTERM to all processes of a job, and a rank that saves its
    state needs batches until it stops. The second one is meant for this process."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, _end))


def _end(number: int, _frame: Any) -> None:
    os._exit(128 + number)


class _Work:
    """One pass of a loader: a thread that fills a queue of steps until it is cancelled."""

    def __init__(self, loader: Loader, start: int, state: State | None) -> None:
        # background processes hold the other prefetched steps
        self.ready: queue.Queue[Any] = queue.Queue(maxsize=1 if loader.workers else loader.prefetch_steps)
        self.cancelled = threading.Event()
        self.thread = threading.Thread(target=self._fill, args=(loader, start, state), name="loader", daemon=True)
        self.thread.start()

    def _fill(self, loader: Loader, start: int, state: State | None) -> None:
        decoded = loader.decoded(loader.planner.walk(start, state))
        try:
            while not self.cancelled.is_set():
                self._put(next(decoded))
        except BaseException as error:  # every failure belongs to the consumer, which raises it
            self._put(error)
        finally:
            decoded.close()  # type: ignore[attr-defined]  # a generator; ends the background processes

    def _put(self, item: Any) -> None:
        while not self.cancelled.is_set():
            try:
                self.ready.put(item, timeout=_PATIENCE_SECONDS)
                return
            except queue.Full:
                continue


class _Prefetched(Iterator[LoadedStep]):
    """Empties the queue of one pass. The thread does not hold it: dropping the iterator cancels the work."""

    def __init__(self, work: _Work, hand_out: Callable[[StepPlan, Sequence[LoadedMicro]], LoadedStep]) -> None:
        self._work = work
        self._hand_out = hand_out
        self._finished = False

    def __next__(self) -> LoadedStep:
        while not self._finished and not self._work.cancelled.is_set():
            try:
                item = self._work.ready.get(timeout=_PATIENCE_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self._finished = True
                raise item
            return self._hand_out(*item)
        raise StopIteration

    def __del__(self) -> None:
        self._work.cancelled.set()


class NoBatches:
    """The steps of a rank that reads nothing: it is sent what it needs."""

    def steps(self, start: int, state: State | None = None) -> Iterator[LoadedStep]:
        """Empty steps without end."""
        while True:
            yield self.last()

    def last(self) -> LoadedStep:
        """An empty step."""
        return LoadedStep([], 0, 0, {})

    def close(self) -> None:
        """Nothing was opened."""
