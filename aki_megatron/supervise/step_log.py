"""A file with one JSON line per step that loses none while the disk is full.

Lines that cannot be written wait in memory, in order, and are written once the disk has space. Checkpoints hold those
that still wait (StepLogs), so that a run resumed from one has every line up to its step (``restore_unwritten``).
"""

import errno
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.supervise.jsonl import discard_steps_after, has_step, read_lines

logger = logging.getLogger("aki_megatron.supervise")

MAX_HELD_LINES = 1000
"""Lines in memory, one per step, at which the run is asked to stop."""


UNWRITTEN = "unwritten"
"""Folder inside a checkpoint; each file in it has the path that it has in the run folder."""


@dataclass(frozen=True)
class _HeldLine:
    step: int
    content: bytes


class StepLog:
    """Append the line of a step; each step has one line, whatever interrupts the run."""

    def __init__(
        self,
        path: Path,
        *,
        report_failure: Callable[[str], None] = logger.error,
        request_stop: Callable[[str], None] = logger.error,
        max_held_lines: int = MAX_HELD_LINES,
    ) -> None:
        """Create a log; ``start`` opens the file.

        report_failure  told when lines begin to wait
        request_stop    asks the run to stop, with the reason, when ``max_held_lines`` wait
        """
        self.path = path
        self._report_failure = report_failure
        self._request_stop = request_stop
        self._max_held_lines = max_held_lines
        self._held: list[_HeldLine] = []
        self._file: int | None = None

    def start(self, step: int) -> None:
        """Open the file and drop the lines of steps after ``step``, which are repeated."""
        self._close_file()
        self._held = [line for line in self._held if line.step <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        discard_steps_after(self.path, step)
        self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line, which has a ``step``; keep it in memory where that fails."""
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        self._held.append(_HeldLine(line["step"], content))
        self._write_held()

    def unwritten_lines(self) -> str:
        """Return the lines that wait in memory, after one more try to write them."""
        self._write_held()
        return b"".join(line.content for line in self._held).decode()

    def close(self, *, in_checkpoint: bool = False) -> None:
        """Close the file. Raises DataError where lines still wait, unless they are ``in_checkpoint``."""
        error = self._write_held()
        self._close_file()
        if error is None:
            return
        text = f"{self.path}: {len(self._held)} lines could not be written: {error.strerror}"
        if not in_checkpoint:
            raise DataError(
                f"{text}. The last checkpoint holds them: make room, then start the run again to write them."
            )
        logger.warning("%s; the checkpoint holds them", text)

    def _write_held(self) -> OSError | None:
        """Write the lines that wait; return why some still do."""
        waited = len(self._held) > 1
        while self._held:
            try:
                self._append(self._held[0].content)
            except OSError as error:
                self._on_failure(error)
                return error
            del self._held[0]
        if waited:
            logger.info("%s can be written again; no line is lost", self.path)
        return None

    def _append(self, content: bytes) -> None:
        """Append a whole line or nothing."""
        assert self._file is not None, "start was not called"
        size = os.fstat(self._file).st_size
        if (written := os.write(self._file, content)) == len(content):
            return
        try:  # what fits on a disk may be a part of the line; the rest fails
            os.write(self._file, content[written:])
            if os.fstat(self._file).st_size != size + len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _on_failure(self, error: OSError) -> None:
        if len(self._held) == 1:
            self._report_failure(
                f"{self.path} cannot be written: {error.strerror}; its lines are kept in memory until there is room, "
                f"for {self._max_held_lines} steps at most"
            )
        elif len(self._held) >= self._max_held_lines:
            self._request_stop(f"{self.path} could not be written for {len(self._held)} steps: {error.strerror}")

    def _close_file(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class StepLogs:
    """The step logs of one rank."""

    def __init__(
        self, run_dir: Path, *, report_failure: Callable[[str], None], request_stop: Callable[[str], None]
    ) -> None:
        """The functions are those of StepLog."""
        self._run_dir = run_dir
        self._report_failure = report_failure
        self._request_stop = request_stop
        self._logs: list[StepLog] = []

    def open(self, path: Path) -> StepLog:
        """Create the log of a file in the run folder."""
        log = StepLog(path, report_failure=self._report_failure, request_stop=self._request_stop)
        self._logs.append(log)
        return log

    def unwritten_files(self) -> dict[str, str]:
        """Return the lines that wait in memory, by the path at which a checkpoint holds them."""
        texts = {log.path.relative_to(self._run_dir).as_posix(): log.unwritten_lines() for log in self._logs}
        return {f"{UNWRITTEN}/{name}": text for name, text in texts.items() if text}


def restore_unwritten(checkpoint: Path, run_dir: Path) -> None:
    """Append to the step logs of a run what a checkpoint holds of them and they lack; on one rank, before any starts.

    Raises DataError where that cannot be written.
    """
    folder = checkpoint / UNWRITTEN
    for source in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = run_dir / source.relative_to(folder)
        try:
            _append_missing(path, source.read_text())
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}; make room and start the run again.") from None
        except (ValueError, KeyError, TypeError):
            logger.warning("%s is damaged", source)  # loading the checkpoint verifies it, and tells what to do


def _append_missing(path: Path, lines: str) -> None:
    last = max((line["step"] for line in read_lines(path, has_step)), default=0)
    missing = [line for line in lines.splitlines() if json.loads(line)["step"] > last]
    if not missing:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    discard_steps_after(path, last)  # also drops a line that was truncated
    with path.open("a") as file:
        file.write("".join(line + "\n" for line in missing))
