"""The end of a run in which a rank fails: all ranks end, one of them says which rank failed first, and why.

When a rank ends, the others fail too: their collectives break, or the launcher sends them SIGTERM. Such an *echo* is
never the cause, so a rank with an echo looks for the cause before it speaks. SIGTERM without a cause asks for a stop:
the run saves a checkpoint and ends in an orderly way. What ranks know of each other lies in <run.dir>/logs, because
files outlive a rank and work under every launcher:

rank_N.process      who rank N is; removed when it ends in an orderly way, so it betrays a rank that was killed
first_failure.json  the cause. Whoever creates it speaks; every other rank stays silent, and so there is one message
"""

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from aki_megatron.config.start import GRACE_SECONDS, USER_ERROR
from aki_megatron.errors import UserError
from aki_megatron.supervise.process import Process, is_alive, this_process
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import StopSignals, forget

logger = logging.getLogger("aki_megatron.train")

FAILED = 1
"""Exit code of an error that is no mistake of the user."""

ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "Timed out waiting",
    "/gloo/",
    "NCCL",
)
"""Words of errors that another rank's end causes. A rank whose own error holds them speaks a moment later, no more."""

PATIENCE_SECONDS, PATIENCE_ELSEWHERE_SECONDS, LOOK_SECONDS = 0.5, 10.0, 0.02
"""How long an echo waits for its cause: mpirun kills a second after SIGTERM; other machines take longer to notice."""

POLL_SECONDS = 2.0
"""How often a rank looks whether another has failed. Most launchers send SIGTERM sooner; not all do, nor everywhere."""

TOLD = {int(number): number.name for number in (signal.SIGTERM, signal.SIGINT)}
"""Signals by which schedulers, launchers and people end a rank."""

ALIKE_SECONDS = 0.2
"""Ranks that meet the same error at the same time let rank 0 say it."""

OLDER_SECONDS = 2.0
"""A first_failure.json that is older than this process by more belongs to an earlier attempt."""

LONGEST_TEXT = 600
"""Characters of an unexpected error on stderr; the log has all of it."""


def is_echo(error: BaseException) -> bool:
    """Whether an error, or one that led to it, is what a rank meets when another one has ended."""
    return any(
        isinstance(cause, dist.DistError)
        or (isinstance(cause, RuntimeError) and any(words in str(cause) for words in ECHOES))
        for cause in _causes(error)
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def describe(error: BaseException) -> str:
    """An error on one line; a user's mistake in its own words and lines."""
    text = str(error) if isinstance(error, UserError) else " ".join(str(error).split())[:LONGEST_TEXT]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class FailureReporter:
    """Speaks for this rank when the run fails, if it is this rank's turn to speak.

    From ``begin`` to ``end`` a rank with others around it answers SIGINT, and a SIGTERM that another rank's failure is
    behind, by ending at once, from a thread of its own: its main thread may be stuck in a collective that waits for a
    rank which is gone. Any other SIGTERM becomes a wish to stop, in ``stop_signals``.
    """

    def __init__(
        self,
        folder: RunPaths,
        rank: int,
        world_size: int,
        stop_signals: StopSignals,
        *,
        by_scheduler: bool = False,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        by_scheduler  SIGTERM comes from Slurm itself, which preempts jobs by it; other launchers mostly send it when a
                      rank has failed
        note          called with what ended the run, before this process ends
        """
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.stop_signals = stop_signals
        self.by_scheduler = by_scheduler
        self.note = note
        self.training = False
        """Before training, ranks mostly make the same mistake alike; rank 0 says it, without naming a rank."""
        self._joined = False
        self._neighbours: dict[int, Process] = {}
        self._ending = threading.Lock()
        self._handlers: dict[int, Any] = {}

    def begin(self) -> None:
        """Announce this rank and forget earlier attempts. Call before joining the other ranks."""
        self.folder.logs.mkdir(parents=True, exist_ok=True)
        if self.world_size == 1:
            self.folder.first_failure.unlink(missing_ok=True)
            return
        this_process().write(self.folder.process(self.rank))
        self._begun = self.folder.process(self.rank).stat().st_mtime
        if self.rank == 0 and not self._cause():
            self.folder.first_failure.unlink(missing_ok=True)
        # a crash in C++ leaves its stack in the rank's log
        self._crashes = self.folder.log(self.rank).open("a")
        faulthandler.enable(self._crashes)
        self._listen()
        if self.stop_signals.terminated and not self.by_scheduler:  # nothing is lost yet
            leave(self.folder, self.rank, 128 + signal.SIGTERM)

    def joined(self) -> None:
        """All ranks have begun: their files are of this attempt."""
        self._neighbours = {
            rank: other for rank, other in self._others().items() if other.machine == this_process().machine
        }
        self._joined = True

    def end(self) -> None:
        """The run has ended well."""
        if self.world_size == 1:
            return
        self._stop_listening()
        faulthandler.disable()
        self._crashes.close()
        self.folder.process(self.rank).unlink(missing_ok=True)

    def hosts(self) -> list[str]:
        """Names of the machines of all ranks, once all have joined."""
        return sorted({process.host for process in [this_process(), *self._others().values()]})

    def accuse(self, rank: int, text: str) -> None:
        """End this process, and with it all others, because of ``rank``; from any thread."""
        if self._ending.acquire(blocking=False):
            leave(self.folder, self.rank, self._speak(rank, text, FAILED))

    def failed(self, error: BaseException) -> int:
        """Log an error of this rank, speak if it is this rank's turn; the exit code. Takes some seconds at most."""
        self._ending.acquire()  # never released: a rank ends once
        logger.error("rank %d stopped", self.rank, exc_info=error)
        code = USER_ERROR if isinstance(error, UserError) else FAILED
        alike = isinstance(error, UserError) and not self.training
        if self.world_size == 1:
            self.note(describe(error))
            self._say(str(error) if isinstance(error, UserError) else describe(error) + self._see_log(self.rank))
            return code
        if is_echo(error):
            return self._echo(describe(error), code)
        if self.rank != 0:
            self._wait_for_cause(GRACE_SECONDS if alike else ALIKE_SECONDS)
        if alike and self.rank == 0:
            return self._speak(self.rank, str(error), code, named=False)
        return self._speak(self.rank, describe(error), code)

    def _echo(self, text: str, code: int) -> int:
        """Speak of a rank that ended without a word, or of this one where no other is to blame; the exit code."""
        replace(this_process(), ending=True).write(self.folder.process(self.rank))
        end = time.monotonic() + self._patience()
        while time.monotonic() < end:
            if cause := self._cause():
                return self._silent(cause)
            if gone := self._gone():
                which = f"ranks {', '.join(map(str, gone))}" if len(gone) > 1 else "it"
                return self._speak(gone[0], f"{which} ended without a word (killed? out of memory?)", code)
            time.sleep(LOOK_SECONDS)
        if quiet := [f"{rank} on {other.host}" for rank, other in self._others().items() if not other.ending]:
            text += f" (not heard of: rank {', rank '.join(quiet)})"
        return self._speak(self.rank, text, code)

    def _patience(self) -> float:
        """Seconds in which the cause of an echo can be expected to show."""
        elsewhere = any(other.machine != this_process().machine for other in self._others().values())
        return PATIENCE_ELSEWHERE_SECONDS if elsewhere else PATIENCE_SECONDS

    def _others(self) -> dict[int, Process]:
        """The other ranks that have not ended in an orderly way."""
        ranks = (rank for rank in range(self.world_size) if rank != self.rank)
        found = {rank: Process.read(self.folder.process(rank)) for rank in ranks}
        return {rank: process for rank, process in found.items() if process is not None}

    def _gone(self) -> list[int]:
        """Ranks of this machine that ended without a word."""
        dead = (rank for rank, other in self._neighbours.items() if not is_alive(other))
        # looked at again: a rank that ends in an orderly way removes its file, then dies
        return [rank for rank in dead if self.folder.process(rank).exists()]

    def _cause(self) -> dict[str, Any]:
        """What first_failure.json of this attempt says; empty when there is none."""
        try:
            # both times are the file system's, whatever the clocks of the machines say
            if self.folder.first_failure.stat().st_mtime < self._begun - OLDER_SECONDS:
                return {}
            return json.loads(self.folder.first_failure.read_text())
        except FileNotFoundError:
            return {}

    def _wait_for_cause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._cause():
            time.sleep(LOOK_SECONDS)

    def _silent(self, cause: dict[str, Any]) -> int:
        self.note(f"rank {cause['rank']}: {cause['text']}")
        logger.error("rank %d ended because of rank %s: %s", self.rank, cause["rank"], cause["text"])
        return int(cause["code"])

    def _speak(self, rank: int, text: str, code: int, *, named: bool = True) -> int:
        """Print what happened to ``rank`` unless some rank has spoken before; the exit code of the whole run."""
        cause = {"rank": rank, "text": text, "code": code, "time": time.time(), "said_by": self.rank}
        try:
            self._claim(json.dumps(cause) + "\n")
        except FileExistsError:
            if earlier := self._cause():
                return self._silent(earlier)
        except OSError as error:  # a full disk, say: better two messages than none
            logger.error("cannot write %s: %s", self.folder.first_failure, error)
        self._say(text + self._see_log(rank) if named else text, f" on rank {rank}" if named else "")
        self.note(f"rank {rank}: {text}" if named else text)
        return code

    def _claim(self, text: str) -> None:
        """Be the first to write first_failure.json; FileExistsError where another rank was. It appears whole."""
        aside = self.folder.first_failure.with_suffix(f".{self.rank}")
        try:
            aside.write_text(text)
            os.link(aside, self.folder.first_failure)
        finally:
            aside.unlink(missing_ok=True)

    def _see_log(self, rank: int) -> str:
        return f"\n  log of rank {rank}: {self.folder.log(rank)}"

    def _say(self, text: str, where: str = "") -> None:
        # the launcher that read stderr may have been killed; the logs have it all
        with suppress(OSError):
            # one write: the lines of several ranks must not mix
            sys.stderr.write(f"error{where}: {text}\n")
            sys.stderr.flush()

    def _listen(self) -> None:
        wakes, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in TOLD:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, lambda *_: None)
        # a forked child would share the socket, and its own SIGTERM would end this process
        os.register_at_fork(after_in_child=self._leave_to_parent)
        threading.Thread(target=self._answer, args=(wakes,), name="signals", daemon=True).start()

    def _stop_listening(self) -> None:
        while self._handlers:
            signal.set_wakeup_fd(-1)
            number, handler = self._handlers.popitem()
            signal.signal(number, handler or signal.SIG_DFL)
        self._wake.close()

    def _leave_to_parent(self) -> None:
        self._stop_listening()
        forget()

    def _answer(self, wakes: socket.socket) -> None:
        """End this process when it is told to, or when another rank has failed; runs in a thread."""
        wakes.settimeout(POLL_SECONDS)
        with wakes:
            while (signals := _receive(wakes)) != b"":  # empty: ``end`` has closed the other side
                reason, code = self._reason_to_end(signals)
                if code and self._ending.acquire(blocking=False):
                    leave(self.folder, self.rank, self._end_from_outside(reason, code))

    def _reason_to_end(self, signals: bytes | None) -> tuple[str, int]:
        """Why this process should end, and its exit code; 0 for no reason."""
        for number in signals or b"":
            if number == signal.SIGINT or (number == signal.SIGTERM and self._is_the_end()):
                return f"told to end by {TOLD[number]}: by its launcher or by a person", 128 + number
        if signals is None and self._another_failed():
            return "another rank failed", FAILED
        return "", 0

    def _another_failed(self) -> bool:
        return bool(self._cause() or self._gone())

    def _is_the_end(self) -> bool:
        """Whether a SIGTERM that has just come ends this process at once; if not, it has become a wish to stop."""
        if self.stop_signals.again():
            return True
        if not self.by_scheduler and not self._joined:
            return True
        end = time.monotonic() + (0.0 if self.by_scheduler else self._patience())
        while not self._another_failed():
            if time.monotonic() >= end:
                logger.warning("rank %d is asked to stop by SIGTERM", self.rank)
                self.stop_signals.stop(signal.SIGTERM.name)
                return False
            time.sleep(LOOK_SECONDS)
        return True

    def _end_from_outside(self, reason: str, code: int) -> int:
        """Why this rank ends although its main thread works, or waits; the exit code."""
        logger.error("rank %d ends: %s; its threads were here:", self.rank, reason)
        faulthandler.dump_traceback(self._crashes)
        # who has not met the others yet has nothing to say about them
        return self._echo(reason, code) if self._joined else code


def _receive(wakes: socket.socket) -> bytes | None:
    """Numbers of the signals that came; None when none came in time."""
    try:
        return wakes.recv(64)
    except TimeoutError:
        return None


def leave(folder: RunPaths, rank: int, code: int) -> None:
    """End this process now: an orderly exit would wait for ranks that are gone. All logs are on disk already."""
    with suppress(OSError):
        folder.process(rank).unlink(missing_ok=True)
    os._exit(code)
