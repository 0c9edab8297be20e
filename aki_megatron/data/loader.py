"""Batches of one data-parallel rank, step by step, prepared ahead in a background thread."""

import queue
import threading
import weakref
from collections.abc import Iterator

from aki_megatron.data.batch import collate
from aki_megatron.data.stream import SampleStream
from aki_megatron.flow import Batch

_PATIENCE_SECONDS = 0.1
_END = object()


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
        self._running: weakref.WeakSet[_Prefetch] = weakref.WeakSet()

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
        running = _Prefetch(self, start, stop)
        self._running.add(running)
        return running

    def close(self) -> None:
        """Stop all background work and wait for it. The loader can be used again."""
        for running in list(self._running):
            running.close()
        self._running.clear()

    @property
    def prefetch_steps(self) -> int:
        """Steps prepared ahead."""
        return self._prefetch_steps

    def _batch(self, numbers: range) -> Batch:
        samples = [self.stream.sample(n) for n in numbers]
        batch = collate(samples, pad_id=self._pad_id, image_size=self._image_size)
        if not self._pin_memory:
            return batch
        return Batch(*(getattr(batch, name).pin_memory() for name in batch.__dataclass_fields__))


class _Prefetch(Iterator[list[Batch]]):
    """One pass of a loader: a thread that fills a queue, and the iterator that empties it."""

    def __init__(self, loader: Loader, start: int, stop: int | None) -> None:
        self._ready: queue.Queue[object] = queue.Queue(maxsize=loader.prefetch_steps)
        self._cancelled = threading.Event()
        self._finished = False
        # the thread holds the queue and the event, not this object: an abandoned iterator is collected and stops it
        arguments = (loader, start, stop, self._ready, self._cancelled)
        self._thread = threading.Thread(target=_fill, args=arguments, name="loader", daemon=True)
        self._thread.start()

    def __next__(self) -> list[Batch]:
        if self._finished:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, list):
            return item
        self._finished = True
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and wait for it; a consumer that still waits gets the end."""
        self._cancelled.set()
        self._thread.join()
        self._finished = True

    def __del__(self) -> None:
        if hasattr(self, "_cancelled"):
            self._cancelled.set()


def _fill(
    loader: Loader, start: int, stop: int | None, ready: "queue.Queue[object]", cancelled: threading.Event
) -> None:
    step = start
    try:
        while not cancelled.is_set() and (stop is None or step < stop):
            _put(ready, loader.load(step), cancelled)
            step += 1
        _put(ready, _END, cancelled)
    except BaseException as error:  # every failure belongs to the consumer, which raises it
        _put(ready, error, cancelled)


def _put(ready: "queue.Queue[object]", item: object, cancelled: threading.Event) -> None:
    while not cancelled.is_set():
        try:
            ready.put(item, timeout=_PATIENCE_SECONDS)
            return
        except queue.Full:
            continue
