"""Load the batches of one data rank step by step, decoded ahead by worker processes or by a thread of this process.

BatchPlanner decides what a step holds; this module decodes it in order, counts bad samples, and hashes what was loaded.
"""

import multiprocessing.queues
import os
import queue
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from aki_megatron.data.bad_samples import BadSample, BadSampleBudget
from aki_megatron.data.batch_planner import DataState, MicrobatchPlan, Planner, StepPlan
from aki_megatron.data.collate import collate
from aki_megatron.data.sample_hash import sample_hash
from aki_megatron.data.sample_stream import SampleStream
from aki_megatron.errors import DataError, UserError
from aki_megatron.types import Batch, Sample

_POLL_SECONDS = 0.1
_MODULUS = 2**64

SHARED_MEMORY = "/dev/shm"
"""Where worker processes hand batches over; containers often give it 64 MB (docker run --shm-size)."""


@dataclass(frozen=True)
class LoadedMicrobatch:
    """A micro-batch, the sum of its samples' hashes, its number of samples, and the bad samples met."""

    batch: Batch
    samples_hash: int
    num_samples: int
    bad_samples: tuple[BadSample, ...]

    def pin_memory(self) -> "LoadedMicrobatch":
        """Return it with its tensors in page-locked memory; torch's DataLoader calls this."""
        return LoadedMicrobatch(self.batch.pin_memory(), self.samples_hash, self.num_samples, self.bad_samples)


@dataclass(frozen=True)
class LoadedStep:
    """One optimizer step of one data rank.

    samples_hash  sum modulo 2^64 over the samples of a hash of (sequence of the step, index in the sequence, content):
                  its sum over all data ranks does not depend on their number
    num_samples   samples of this data rank
    next_state    the state that the next step starts from
    """

    batches: Sequence[Batch]
    samples_hash: int
    num_samples: int
    next_state: DataState


class MicrobatchDataset(Dataset[LoadedMicrobatch | UserError]):
    """Turn plans into micro-batches; runs in the worker processes.

    ``sequence_length`` is that of every packed sequence; None pads to the longest of each micro-batch.
    """

    def __init__(
        self, streams: Sequence[SampleStream], *, pad_id: int, image_size: int, sequence_length: int | None
    ) -> None:
        self._streams = streams
        self._pad_id = pad_id
        self._image_size = image_size
        self._sequence_length = sequence_length

    def __getitem__(self, plan: MicrobatchPlan) -> LoadedMicrobatch | UserError:
        """Decode and collate. A UserError is returned: raised in a worker process, torch would rewrite its message."""
        try:
            loaded = self._load(plan)
            return loaded if get_worker_info() is None else _in_shared_memory(loaded)
        except UserError as error:
            return error
        except RuntimeError as error:
            if get_worker_info() is None or "shared memory" not in str(error):
                raise
            return _worker_error("A worker process that decodes images cannot hand over a micro-batch", error)

    def _load(self, plan: MicrobatchPlan) -> LoadedMicrobatch:
        stream = self._streams[plan.phase]
        sequences: list[list[Sample]] = []
        bad_samples: list[BadSample] = []
        samples_hash = num_samples = 0
        for sequence, numbers in plan.sequences:
            sequences.append([])
            for index, number in enumerate(numbers):
                loaded = stream.sample(number, replace_images=self._sequence_length is None)
                bad_samples += loaded.bad_samples
                if loaded.sample is not None:
                    sequences[-1].append(loaded.sample)
                    samples_hash += sample_hash(sequence, index, loaded.sample)
                    num_samples += 1
        batch = collate(
            sequences,
            pad_id=self._pad_id,
            image_size=self._image_size,
            sequence_length=self._sequence_length,
            num_bad_samples=len(bad_samples),
        )
        return LoadedMicrobatch(batch, samples_hash % _MODULUS, num_samples, tuple(bad_samples))


class StepLoader:
    """The steps of one data rank.

    num_workers     worker processes that decode; 0: a thread of this process does
    prefetch_steps  steps prepared ahead
    """

    def __init__(
        self,
        planner: Planner,
        dataset: MicrobatchDataset,
        *,
        bad_sample_budget: BadSampleBudget,
        num_workers: int = 0,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        assert prefetch_steps >= 1 and num_workers >= 0, (prefetch_steps, num_workers)
        self.planner = planner
        self.dataset = dataset
        self.bad_sample_budget = bad_sample_budget
        self.num_workers = num_workers
        self.prefetch_steps = prefetch_steps
        self.pin_memory = pin_memory
        self._last: LoadedStep | None = None
        self._prefetchers: list[_Prefetcher] = []

    def steps(self, start: int, state: DataState | None = None) -> Iterator[LoadedStep]:
        """Iterate over steps start, start+1, ... without end; ``state`` is that after step ``start - 1``.

        Prefetching starts at once. An error of the background is raised here, at the step it belongs to;
        BadSampleBudgetExceeded when more samples were bad than the budget allows.
        """
        self._prefetchers = [running for running in self._prefetchers if running.thread.is_alive()]
        self._prefetchers.append(_Prefetcher(self, start, state))
        return _PrefetchedSteps(self._prefetchers[-1], self._finish_step)

    def _finish_step(self, plan: StepPlan, microbatches: Sequence[LoadedMicrobatch]) -> LoadedStep:
        num_samples = sum(loaded.num_samples for loaded in microbatches)
        self.bad_sample_budget.record(num_samples, (bad for loaded in microbatches for bad in loaded.bad_samples))
        samples_hash = sum(loaded.samples_hash for loaded in microbatches) % _MODULUS
        self._last = LoadedStep([loaded.batch for loaded in microbatches], samples_hash, num_samples, plan.next_state)
        return self._last

    def last_step(self) -> LoadedStep:
        """Return the step that was returned last."""
        assert self._last is not None, "no step was loaded yet"
        return self._last

    def close(self) -> None:
        """Stop all background work and wait for it. The loader can be used again."""
        for prefetcher in self._prefetchers:
            prefetcher.cancelled.set()
        for prefetcher in self._prefetchers:
            prefetcher.thread.join()
        self._prefetchers = []

    def load(self, plans: Iterator[StepPlan]) -> Iterator[tuple[StepPlan, list[LoadedMicrobatch]]]:
        """Yield every plan with its micro-batches, in order."""
        if not self.num_workers:
            for plan in plans:
                loaded = [_checked(self.dataset[microbatch]) for microbatch in plan.microbatches]
                yield plan, [microbatch.pin_memory() for microbatch in loaded] if self.pin_memory else loaded
            return
        pending: deque[StepPlan] = deque()

        def microbatch_plans() -> Iterator[MicrobatchPlan]:
            for plan in plans:
                pending.append(plan)
                yield from plan.microbatches

        workers = self._start_workers(microbatch_plans())
        try:
            while True:
                loaded = [_checked(_next_result(workers)) for _ in range(self.planner.num_microbatches)]
                yield pending.popleft(), loaded
        finally:
            del workers  # ends the processes, although an error that is raised keeps this frame alive

    def _start_workers(self, plans: Iterator[MicrobatchPlan]) -> Iterator[LoadedMicrobatch | UserError]:
        """Start the worker processes; return an iterator over their results in the order of the plans."""
        # torch advises against more processes than cores; how many is the user's choice
        warnings.filterwarnings("ignore", message="This DataLoader will create .* worker processes")
        num_ahead = self.prefetch_steps * self.planner.num_microbatches
        data_loader = DataLoader(
            self.dataset,
            sampler=_PlanSampler(plans),
            batch_size=None,
            num_workers=self.num_workers,
            prefetch_factor=max(1, -(-num_ahead // self.num_workers)),
            pin_memory=self.pin_memory,
            # records of the sources are shared with the parent's memory, not copied
            multiprocessing_context="fork",
            worker_init_fn=init_worker,
        )
        try:
            return iter(data_loader)
        except OSError as error:
            raise _worker_error("The worker processes that decode images cannot be started", error) from None


def _next_result(workers: Iterator[LoadedMicrobatch | UserError]) -> LoadedMicrobatch | UserError:
    """Return the next result. Raises DataError when a worker process has ended, or when its result cannot be read.

    An error that was raised in a worker is raised here with its own message; that of torch, which holds the worker's
    stack, is its cause, for the log.
    """
    try:
        return next(workers)
    except Exception as error:
        if (message := _message_in_worker(error)) is not None:
            error.__traceback__ = None
            raise type(error)(message) from error
        if not isinstance(error, EOFError | OSError | RuntimeError):
            raise
        error.__traceback__ = None  # its frames would keep the worker processes alive
        what = "A worker process that decodes images ended without an error message (killed? out of memory?)"
        raise _worker_error(what, error) from None


def _message_in_worker(error: Exception) -> str | None:
    """Return the message of an error in a worker, which torch repeats below "Caught ..." and the stack; else None."""
    text = str(error)
    if not text.startswith("Caught ") or "Original Traceback" not in text:
        return None
    lines = text.rstrip().splitlines()
    end_of_stack = max(number for number, line in enumerate(lines) if line.startswith(("  ", "Original Traceback")))
    return "\n".join(lines[end_of_stack + 1 :]).removeprefix(f"{type(error).__name__}: ")


def _checked(loaded: LoadedMicrobatch | UserError) -> LoadedMicrobatch:
    if isinstance(loaded, UserError):
        raise loaded
    return loaded


class _PlanSampler:
    """A sampler for torch's DataLoader that yields plans instead of indices."""

    def __init__(self, plans: Iterator[MicrobatchPlan]) -> None:
        self._plans = plans

    def __iter__(self) -> Iterator[MicrobatchPlan]:
        return self._plans


def init_worker(_worker: int) -> None:
    """Set up a worker process: one thread, and signals are left to the rank.

    A scheduler may send SIGTERM to all processes of a job, and a rank that saves its state needs batches until it
    stops. So the worker obeys the SIGTERM of its rank only, which is how multiprocessing ends a worker at exit.
    """
    torch.set_num_threads(1)
    sys.excepthook = partial(_print_error, sys.excepthook)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # blocked before any other thread starts, so that the signal waits for the thread that asks who sent it
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_with_rank, args=(os.getppid(),), name="sigterm", daemon=True).start()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_exit_on_lost_result)  # type: ignore[attr-defined]


def _print_error(
    print_error: Callable[..., object],
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
) -> None:
    """Print an error of multiprocessing's threads in this worker, but not that the rank has ended: so does the worker.

    A rank that lives on meets such an error on its side, and reports it.
    """
    if not issubclass(kind, EOFError | ConnectionError):
        print_error(kind, error, traceback)


def _exit_with_rank(rank_pid: int) -> None:
    """End this process at the SIGTERM of process ``rank_pid``, or at any once that process has ended."""
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == rank_pid or os.getppid() != rank_pid:
            os._exit(128 + signal.SIGTERM)


def _exit_on_lost_result(error: Exception, _result: object) -> None:
    """End this process: multiprocessing would drop a result that it cannot send, and the rank would wait for ever."""
    with suppress(OSError):
        sys.stderr.write(f"a loader worker cannot send a micro-batch: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
    os._exit(1)


def _in_shared_memory(loaded: LoadedMicrobatch) -> LoadedMicrobatch:
    """Move the tensors where the rank can read them; done here, where an error can be reported."""
    for tensor in loaded.batch.tensors():
        tensor.share_memory_()
    return loaded


def _worker_error(what: str, error: BaseException) -> DataError:
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    return DataError(
        f"{what}: {text.splitlines()[0] if text else type(error).__name__}. Lower data.num_workers or "
        f"data.prefetch_steps, or enlarge {SHARED_MEMORY}; data.num_workers 0 decodes in this process."
    )


class _Prefetcher:
    """A thread that fills a queue with the steps from ``start`` on until it is cancelled."""

    def __init__(self, loader: StepLoader, start: int, state: DataState | None) -> None:
        # worker processes hold the other prefetched steps
        self.ready: queue.Queue[Any] = queue.Queue(maxsize=1 if loader.num_workers else loader.prefetch_steps)
        self.cancelled = threading.Event()
        self.thread = threading.Thread(target=self._fill, args=(loader, start, state), name="loader", daemon=True)
        self.thread.start()

    def _fill(self, loader: StepLoader, start: int, state: DataState | None) -> None:
        loaded = loader.load(loader.planner.plan_steps(start, state))
        try:
            while not self.cancelled.is_set():
                self._put(next(loaded))
        except BaseException as error:  # every failure belongs to the consumer, which raises it
            self._put(error)
        finally:
            loaded.close()  # type: ignore[attr-defined]  # a generator; ends the worker processes

    def _put(self, item: Any) -> None:
        while not self.cancelled.is_set():
            try:
                self.ready.put(item, timeout=_POLL_SECONDS)
                return
            except queue.Full:
                continue


class _PrefetchedSteps(Iterator[LoadedStep]):
    """Take steps from a prefetcher's queue. Its thread does not reference this: dropping the iterator cancels it."""

    def __init__(
        self, prefetcher: _Prefetcher, finish_step: Callable[[StepPlan, Sequence[LoadedMicrobatch]], LoadedStep]
    ) -> None:
        self._prefetcher = prefetcher
        self._finish_step = finish_step
        self._finished = False

    def __next__(self) -> LoadedStep:
        while not self._finished and not self._prefetcher.cancelled.is_set():
            try:
                item = self._prefetcher.ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, BaseException):
                self._finished = True
                raise item
            return self._finish_step(*item)
        raise StopIteration

    def __del__(self) -> None:
        self._prefetcher.cancelled.set()


class EmptyStepLoader:
    """The steps of a rank that reads no data: other ranks send it what it needs."""

    def steps(self, start: int, state: DataState | None = None) -> Iterator[LoadedStep]:
        """Iterate over empty steps without end."""
        while True:
            yield self.last_step()

    def last_step(self) -> LoadedStep:
        """Return an empty step."""
        return LoadedStep([], 0, 0, {})

    def close(self) -> None:
        """Do nothing: there is no background work."""
