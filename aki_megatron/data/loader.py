"""Batches of one data-parallel rank, step by step, prepared ahead in a background thread."""

import queue
import threading
from collections.abc import Iterator
from itertools import repeat

from aki_megatron.data.batch import collate
from aki_megatron.data.stream import SampleStream
from aki_megatron.flow import Batch

_PATIENCE_SECONDS = 0.1


class Loader:
    """Cuts the sample stream into optimizer steps. Its whole state is the step number.

    Step s takes samples s*G ... s*G + G - 1 (G = global_batch); micro-batch m of rank r holds the numbers
    s*G + (m*data_size + r)*micro_batch + (0 ... micro_batch-1). So the samples of a step and their order do not
    depend on the number of ranks, and any step can be the first.
    """

    def __init__(
        self,
        stream: SampleStream,
        *,
        pad_id: int,
        image_size: int,
        global_batch: int,
        micro_batch: int,
        data_rank: int = 0,
        data_size: int = 1,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        assert global_batch % (micro_batch * data_size) == 0, (global_batch, micro_batch, data_size)
        assert 0 <= data_rank < data_size and prefetch_steps >= 1, (data_rank, data_size, prefetch_steps)
        self.stream = stream
        self.micro_batches = global_batch // (micro_batch * data_size)
        self._pad_id = pad_id
        self._image_size = image_size
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        self._data_rank = data_rank
        self._data_size = data_size
        self._prefetch_steps = prefetch_steps
        self._pin_memory = pin_memory
        self._work: list[_Work] = []

    def numbers(self, step: int, micro: int) -> range:
        """The sample numbers of one micro-batch of this rank."""
        first = step * self._global_batch + (micro * self._data_size + self._data_rank) * self._micro_batch
        return range(first, first + self._micro_batch)

    def load(self, step: int) -> list[Batch]:
        """The micro-batches of one step, prepared now, in the calling thread. Raises TooManyLost."""
        return [self._batch(self.numbers(step, micro)) for micro in range(self.micro_batches)]

    def steps(self, start: int, stop: int | None = None) -> Iterator[list[Batch]]:
        """The micro-batches of steps start, start+1, ... (up to, not including, ``stop``).

        Preparation starts at once. What goes wrong in the background is raised here, at the step it belongs to.
        """
        self._work = [work for work in self._work if work.thread.is_alive()]
        self._work.append(_Work(self, start, stop))
        return _Prefetched(self._work[-1])

    def close(self) -> None:
        """Stop all background work and wait for it. The loader can be used again."""
        for work in self._work:
            work.cancelled.set()
        for work in self._work:
            work.thread.join()
        self._work = []

    @property
    def prefetch_steps(self) -> int:
        """Steps prepared ahead."""
        return self._prefetch_steps

    def _batch(self, numbers: range) -> Batch:
        samples = [self.stream.sample(n) for n in numbers]
        batch = collate([[sample] for sample in samples], pad_id=self._pad_id, image_size=self._image_size)
        if not self._pin_memory:
            return batch
        return Batch(*(getattr(batch, name).pin_memory() for name in batch.__dataclass_fields__))


class NoBatches:
    """The steps of a rank that another rank's batches reach by other ways: no micro-batch in any of them."""

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """An empty list for ever."""
        return repeat([])

    def close(self) -> None:
        """Nothing to stop."""


class _Work:
    """One pass of a loader: a thread that fills a queue of steps until it is done or cancelled."""

    def __init__(self, loader: Loader, start: int, stop: int | None) -> None:
        self.ready: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(maxsize=loader.prefetch_steps)
        self.cancelled = threading.Event()
        self.thread = threading.Thread(target=self._fill, args=(loader, start, stop), name="loader", daemon=True)
        self.thread.start()

    def _fill(self, loader: Loader, start: int, stop: int | None) -> None:
        step = start
        try:
            while not self.cancelled.is_set() and (stop is None or step < stop):
                self._put(loader.load(step))
                step += 1
            self._put(None)
        except BaseException as error:  # every failure belongs to the consumer, which raises it
            self._put(error)

    def _put(self, item: list[Batch] | BaseException | None) -> None:
        while not self.cancelled.is_set():
            try:
                self.ready.put(item, timeout=_PATIENCE_SECONDS)
                return
            except queue.Full:
                continue


class _Prefetched(Iterator[list[Batch]]):
    """Empties the queue of one pass. The thread does not hold it: dropping the iterator cancels the work."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._finished = False

    def __next__(self) -> list[Batch]:
        while not self._finished and not self._work.cancelled.is_set():
            try:
                item = self._work.ready.get(timeout=_PATIENCE_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, list):
                return item
            self._finished = True
            if item is not None:
                raise item
        raise StopIteration

    def __del__(self) -> None:
        self._work.cancelled.set()
