"""Indices of many tars made at once, by processes of their own.

A worker is a plain interpreter that runs ``work()``: it gets one job per line on its input and answers with one line.
It shares nothing with the process that trains: no fork of threads and a GPU, no import of its main file.
Several ranks may do this for the same tars at the same time: each goes through them in another order and skips what
another one finished meanwhile, so they share the work without talking; an index appears whole or not at all.
"""

import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import aki_megatron
from aki_megatron.data.fetch import ShardCache
from aki_megatron.data.tar_index import belongs, read_header, write_index
from aki_megatron.errors import DataError

SMALL_BYTES = 64 * 2**20
"""Local tars of less than this together are indexed in the calling process."""

MOST_WORKERS = 16

_REPORT_SECONDS = 5.0
_SHOWN = 5


@dataclass(frozen=True)
class Job:
    """One index to make: of the file ``tar``, or of what ``command`` fetches into the cache."""

    index: str
    tar: str
    command: str
    cache: str
    cache_bytes: int


def make_index(job: Job) -> int:
    """Make one index unless it is there and belongs to its tar; returns the number of samples. Raises DataError."""
    index = Path(job.index)
    header = read_header(index)
    if not job.command:
        tar = Path(job.tar)
        try:
            found = tar.stat()
        except OSError as error:
            raise DataError(f"Tar {tar} cannot be read: {error}") from error
        if header is not None and belongs(header, tar, found.st_size, found.st_mtime_ns):
            return header.samples
        return write_index(tar, index)
    cache = ShardCache(Path(job.cache), job.cache_bytes)
    if header is None and cache.fetch_index(job.command, index):
        header = read_header(index)
    if header is not None:
        return header.samples
    path = cache.fetch(job.command)
    try:
        return write_index(path, index, whole=True)
    except DataError as error:
        cache.discard(job.command)
        raise DataError(f"What pipe:{job.command} wrote is not a whole tar: {error}") from error


def make_indices(
    jobs: Sequence[Job], *, small: bool, workers: int | None = None, progress: Callable[[str], None] | None = None
) -> None:
    """Make the indices of all jobs; where some fail, the others are made, then one DataError names the first of them.

    ``small`` does it here, without processes. ``workers`` defaults to the cores of this process, 16 at most.
    """
    report = _Report(len(jobs), progress)
    if small:
        for job in jobs:
            report.done(_attempt(job))
    else:
        shuffled = list(jobs)
        random.SystemRandom().shuffle(shuffled)
        waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in shuffled:
            waiting.put(job)
        number = min(len(jobs), workers or min(MOST_WORKERS, len(os.sched_getaffinity(0))))
        with ThreadPoolExecutor(number) as pool:
            try:
                for future in [pool.submit(_serve, waiting, report) for _ in range(number)]:
                    future.result()
            except BaseException:
                _empty(waiting)  # or leaving the pool would wait for all that is left
                raise
    report.close()


class _Report:
    """Counts what is done, says so now and then, and keeps the failures."""

    def __init__(self, total: int, progress: Callable[[str], None] | None) -> None:
        self.total, self.progress = total, progress
        self.tars = self.samples = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._start = self._said = time.monotonic()

    def done(self, result: int | str) -> None:
        """One more job: its number of samples, or what went wrong."""
        with self._lock:
            self.tars += 1
            if isinstance(result, str):
                self.errors.append(result)
            else:
                self.samples += result
            if time.monotonic() - self._said >= _REPORT_SECONDS:
                self._say()

    def close(self) -> None:
        """Say the end; DataError if anything failed."""
        self._say()
        if self.errors:
            rest = [f"... and {len(self.errors) - _SHOWN} more"] if len(self.errors) > _SHOWN else []
            listing = "\n  ".join(self.errors[:_SHOWN] + rest)
            raise DataError(f"{len(self.errors)} of {self.total} tars could not be indexed:\n  {listing}")

    def _say(self) -> None:
        self._said = time.monotonic()
        if self.progress is not None:
            seconds = self._said - self._start
            rate = self.tars / max(seconds, 1e-9)
            left = f", {(self.total - self.tars) / rate:.0f} s left" if 0 < self.tars < self.total else ""
            self.progress(
                f"Indexed {self.tars:,} of {self.total:,} tars ({self.samples:,} samples, {seconds:.0f} s{left})."
            )


def _empty(waiting: "queue.SimpleQueue[Job]") -> None:
    try:
        while True:
            waiting.get_nowait()
    except queue.Empty:
        return


def _attempt(job: Job) -> int | str:
    try:
        return make_index(job)
    except DataError as error:
        return str(error)


def _serve(waiting: "queue.SimpleQueue[Job]", report: _Report) -> None:
    """Feed one worker process until no job is left. Raises DataError where the process dies."""
    package = str(Path(aki_megatron.__file__).resolve().parents[1])
    code = f"import sys; sys.path.insert(0, {package!r}); from aki_megatron.data.index_build import work; work()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                process.stdin.write(json.dumps(asdict(job)) + "\n")
                process.stdin.flush()
                answer = process.stdout.readline()
            except OSError:
                answer = ""
            if not answer:
                raise DataError(
                    f"The process that was indexing {job.tar or 'pipe:' + job.command} ended with exit code "
                    f"{process.wait()} (a negative one is a signal; -9 may be a lack of memory). Start again: what "
                    "was indexed is kept."
                )
            report.done(json.loads(answer))
    finally:
        with suppress(OSError):  # a dead worker cannot take what is still buffered
            process.stdin.close()  # the worker ends at the end of its input
        process.stdout.close()
        process.wait()


def work() -> None:
    """The worker's loop: a job per line of the input; samples, or what went wrong, per line of the output."""
    for line in sys.stdin:
        print(json.dumps(_attempt(Job(**json.loads(line)))), flush=True)
