"""Build the indices of many tars in parallel, in worker processes.

A worker is a plain interpreter that runs ``worker_main()``: it gets one job per line on its input and answers with one
line. It shares nothing with the process that trains: no fork of threads and a GPU, no import of its main file.
Several ranks may do this for the same tars at the same time: each goes through them in another order and skips what
another one finished meanwhile, so they share the work without communication; an index appears whole or not at all.
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
from aki_megatron.data.shard_cache import ShardCache, display_name
from aki_megatron.data.tar_index import index_matches, read_header, write_index
from aki_megatron.errors import DataError

IN_PROCESS_BYTES = 64 * 2**20
"""Local tars of less than this together are indexed in the calling process."""

MAX_WORKERS = 16

_REPORT_SECONDS = 5.0
_MAX_LISTED = 5


@dataclass(frozen=True)
class IndexJob:
    """One index to build: of the file ``tar``, or of what ``command`` fetches into the cache."""

    index: str
    tar: str
    command: str
    cache: str
    cache_bytes: int


def build_index(job: IndexJob) -> int:
    """Build one index unless it exists and matches its tar; return the number of samples. Raises DataError."""
    index = Path(job.index)
    header = read_header(index)
    if not job.command:
        tar = Path(job.tar)
        try:
            found = tar.stat()
        except OSError as error:
            raise DataError(f"Tar {tar} cannot be read: {error}") from error
        if header is not None and index_matches(header, tar, found.st_size, found.st_mtime_ns):
            return header.num_samples
        return write_index(tar, index)
    cache = ShardCache(Path(job.cache), job.cache_bytes)
    if header is None and cache.fetch_index(job.command, index):
        header = read_header(index)
    if header is not None:
        return header.num_samples
    path = cache.fetch(job.command)
    try:
        return write_index(path, index, require_complete=True)
    except DataError as error:
        cache.discard(job.command)
        raise DataError(f"What {display_name(job.command)} wrote is not a whole tar: {error}") from error


def build_indices(
    jobs: Sequence[IndexJob],
    *,
    in_process: bool,
    num_workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Build the indices of all jobs; where some fail, finish the others, then raise one DataError naming the first.

    in_process   build them here, without worker processes
    num_workers  the default is the number of cores of this process, 16 at most
    """
    report = _ProgressReport(len(jobs), progress)
    if in_process:
        for job in jobs:
            report.done(_try_build(job))
    else:
        shuffled = list(jobs)
        random.SystemRandom().shuffle(shuffled)
        pending: queue.SimpleQueue[IndexJob] = queue.SimpleQueue()
        for job in shuffled:
            pending.put(job)
        number = min(len(jobs), num_workers or min(MAX_WORKERS, len(os.sched_getaffinity(0))))
        with ThreadPoolExecutor(number) as pool:
            try:
                for future in [pool.submit(_run_worker, pending, report) for _ in range(number)]:
                    future.result()
            except BaseException:
                _drain(pending)  # or leaving the pool would wait for all that is left
                raise
    report.close()


class _ProgressReport:
    """Count what is done, report it every few seconds, and keep the errors."""

    def __init__(self, total: int, progress: Callable[[str], None] | None) -> None:
        self.total, self.progress = total, progress
        self.num_tars = self.num_samples = 0
        self.errors: list[str] = []
        self._lock = threading.Lock()
        self._start = self._reported = time.monotonic()

    def done(self, result: int | str) -> None:
        """Count one more job: its number of samples, or what went wrong."""
        with self._lock:
            self.num_tars += 1
            if isinstance(result, str):
                self.errors.append(result)
            else:
                self.num_samples += result
            if time.monotonic() - self._reported >= _REPORT_SECONDS:
                self._report()

    def close(self) -> None:
        """Report the end. Raises DataError if anything failed."""
        self._report()
        if self.errors:
            rest = [f"... and {len(self.errors) - _MAX_LISTED} more"] if len(self.errors) > _MAX_LISTED else []
            listing = "\n  ".join(self.errors[:_MAX_LISTED] + rest)
            raise DataError(f"{len(self.errors)} of {self.total} tars could not be indexed:\n  {listing}")

    def _report(self) -> None:
        self._reported = time.monotonic()
        if self.progress is not None:
            seconds = self._reported - self._start
            rate = self.num_tars / max(seconds, 1e-9)
            left = f", {(self.total - self.num_tars) / rate:.0f} s left" if 0 < self.num_tars < self.total else ""
            self.progress(
                f"Indexed {self.num_tars:,} of {self.total:,} tars "
                f"({self.num_samples:,} samples, {seconds:.0f} s{left})."
            )


def _drain(pending: "queue.SimpleQueue[IndexJob]") -> None:
    try:
        while True:
            pending.get_nowait()
    except queue.Empty:
        return


def _try_build(job: IndexJob) -> int | str:
    try:
        return build_index(job)
    except DataError as error:
        return str(error)


def _run_worker(pending: "queue.SimpleQueue[IndexJob]", report: _ProgressReport) -> None:
    """Feed one worker process until no job is left. Raises DataError where the process dies."""
    package = str(Path(aki_megatron.__file__).resolve().parents[1])
    code = (
        f"import sys; sys.path.insert(0, {package!r}); "
        "from aki_megatron.data.tar_index_builder import worker_main; worker_main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    try:
        while True:
            try:
                job = pending.get_nowait()
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
                    f"The process that was indexing {job.tar or display_name(job.command)} ended with exit code "
                    f"{process.wait()} (a negative one is a signal; -9 may be a lack of memory). Start again: what "
                    "was indexed is kept."
                )
            report.done(json.loads(answer))
    finally:
        with suppress(OSError):  # a dead worker cannot take what is still buffered
            process.stdin.close()  # the worker ends at the end of its input
        process.stdout.close()
        process.wait()


def worker_main() -> None:
    """Run a worker: a job per line of the input; the number of samples, or the error, per line of the output."""
    for line in sys.stdin:
        print(json.dumps(_try_build(IndexJob(**json.loads(line)))), flush=True)
