"""End a run in which a rank fails: all ranks end, and one of them reports which rank failed first, and why.

When a rank ends, the others fail too: their collectives break, or the launcher sends them SIGTERM. Such a *secondary
failure* is never the cause, so a rank that meets one looks for the cause before it reports. SIGTERM without a cause
asks for a stop: the run saves a checkpoint and ends in an orderly way. Ranks share what they know through files in
<run.dir>/logs/start_<id>, because files outlive a process and work under every launcher; the folder belongs to the
ranks of one start, so that no other start takes its files for its own:

rank_N.process      identifies the process of rank N; removed on an orderly exit, so it reveals a rank that was killed
first_failure.json  the cause. The rank that creates it prints the error; the others stay quiet, so there is one error
"""

import faulthandler
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from aki_megatron.errors import ConfigError, UserError
from aki_megatron.supervise.exit_codes import FAILED, USER_ERROR, USER_ERROR_GRACE_SECONDS
from aki_megatron.supervise.first_failure import FirstFailure, read_first_failure
from aki_megatron.supervise.process import RankProcess, is_alive, this_process
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.secondary_failures import format_error, is_secondary_failure
from aki_megatron.supervise.signal_listener import SignalListener
from aki_megatron.supervise.signals import StopSignals

logger = logging.getLogger("aki_megatron.supervise")

CAUSE_SECONDS, REMOTE_CAUSE_SECONDS, POLL_SECONDS = 0.5, 10.0, 0.02
"""How long a secondary failure waits for its cause: mpirun kills a second after SIGTERM, so not long on one machine;
other machines take longer to notice. Meanwhile it checks every POLL_SECONDS."""

OTHER_RANKS_POLL_SECONDS = 2.0
"""How often a rank checks whether another has failed. Most launchers send SIGTERM sooner, but not all, nor always."""

HANDLED_SIGNALS = {int(number): number.name for number in (signal.SIGTERM, signal.SIGINT)}
"""Signals by which schedulers, launchers and users end a rank."""

SAME_ERROR_SECONDS = 0.2
"""Ranks other than 0 wait this long, so that rank 0 reports an error that all ranks meet at the same time."""

STALE_SECONDS = 2.0
"""A first_failure.json older than the start of this process by more than this belongs to an earlier attempt."""


class FailureReporter:
    """Print one error for the whole run, from the rank that failed first.

    From ``begin`` to ``end`` a rank of several answers SIGINT, and a SIGTERM caused by the failure of another rank, by
    ending at once, from a thread: its main thread may be stuck in a collective that waits for a dead rank. Any other
    SIGTERM becomes a stop request in ``stop_signals``.
    """

    def __init__(
        self,
        paths: RunPaths,
        rank: int,
        world_size: int,
        stop_signals: StopSignals,
        *,
        start_id: str,
        sigterm_from_scheduler: bool = False,
        on_failure: Callable[[str, int], None] = lambda text, code: None,
        on_exit: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the reporter of one rank.

        start_id                what the ranks of this start have in common; names the folder of their files
        sigterm_from_scheduler  SIGTERM comes from Slurm itself, which preempts jobs by it; other launchers mostly send
                                it when a rank has failed
        on_failure              called with the cause of the failure and the exit code, before this process ends
        on_exit                 called before this process ends at once; interpreters run nothing then
        """
        self.paths = paths
        self.files = paths.start(start_id)
        self.rank = rank
        self.world_size = world_size
        self.stop_signals = stop_signals
        self.sigterm_from_scheduler = sigterm_from_scheduler
        self.on_failure = on_failure
        self.on_exit = on_exit
        self.training_started = False
        """Before training all ranks usually meet the same user error; rank 0 reports it without naming a rank."""
        self._joined = False
        self._local_ranks: dict[int, RankProcess] = {}
        """Other ranks on this machine, whose processes this one can check."""
        self._ending = threading.Lock()

    def begin(self) -> None:
        """Write this rank's process file and remove what earlier starts left. Call it before joining other ranks.

        Raises ConfigError where a live process of another start has the file of this rank.
        """
        if self.rank == 0:
            for other in self.paths.starts():
                if self.world_size == 1 or other != self.files:
                    shutil.rmtree(other.path, ignore_errors=True)
        if self.world_size == 1:
            self.paths.logs.mkdir(parents=True, exist_ok=True)
            return
        self.files.path.mkdir(parents=True, exist_ok=True)
        self._check_not_running()
        this_process().write(self.files.process(self.rank))
        self._begun = self.files.process(self.rank).stat().st_mtime
        if self.rank == 0 and not self._cause():
            self.files.first_failure.unlink(missing_ok=True)
        # a crash in C++ leaves its stack in the rank's log
        self._crash_log = self.paths.log(self.rank).open("a")
        faulthandler.enable(self._crash_log)
        self._listener = SignalListener(HANDLED_SIGNALS, self._on_wakeup, poll_seconds=OTHER_RANKS_POLL_SECONDS)
        self._listener.begin()
        if self.stop_signals.sigterm_received and not self.sigterm_from_scheduler:  # nothing is lost yet
            self.exit_now(128 + signal.SIGTERM)

    def _check_not_running(self) -> None:
        other, own = RankProcess.read(self.files.process(self.rank)), this_process()
        if other is not None and other.machine == own.machine and other.pid != own.pid and is_alive(other):
            raise ConfigError(
                f"{self.paths.path} is in use: process {other.pid} on {other.host} is rank {self.rank} of a run that "
                "trains there. Wait for its end, or give this run a folder of its own (--run.dir)."
            )

    def mark_joined(self) -> None:
        """Note that all ranks have begun, so that their process files are of this attempt."""
        machine = this_process().machine
        self._local_ranks = {rank: other for rank, other in self._other_ranks().items() if other.machine == machine}
        self._joined = True

    def end(self) -> None:
        """Stop listening after a run that ended well."""
        if self.world_size == 1:
            return
        self._listener.end()
        faulthandler.disable()
        self._crash_log.close()
        self.files.process(self.rank).unlink(missing_ok=True)
        with suppress(OSError):  # not empty yet: the last rank removes the folder
            self.files.path.rmdir()

    def exit_now(self, code: int) -> None:
        """End this process at once: an orderly exit would wait for dead ranks. All logs are on disk already."""
        with suppress(OSError):
            self.files.process(self.rank).unlink(missing_ok=True)
        self.on_exit()
        os._exit(code)

    def hosts(self) -> list[str]:
        """Return the names of the machines of all ranks, once all have joined."""
        return sorted({process.host for process in [this_process(), *self._other_ranks().values()]})

    def report_rank_failure(self, rank: int, text: str) -> None:
        """End this process, and with it all others, because of ``rank``. May be called from any thread."""
        if self._ending.acquire(blocking=False):
            self.exit_now(self._report(rank, text, FAILED))

    def report(self, error: BaseException) -> int:
        """Log an error of this rank, print it if this rank is to report; return the exit code.

        Takes some seconds at most.
        """
        self._ending.acquire()  # never released: a rank ends once
        logger.error("rank %d stopped", self.rank, exc_info=error)
        code = USER_ERROR if isinstance(error, UserError) else FAILED
        same_on_all_ranks = isinstance(error, UserError) and not self.training_started
        if self.world_size == 1:
            self.on_failure(format_error(error), code)
            text = str(error) if isinstance(error, UserError) else format_error(error) + self._log_hint(self.rank)
            self._print_error(text)
            return code
        if is_secondary_failure(error):
            return self._secondary_failure(format_error(error), code)
        if self.rank != 0:
            self._wait_for_cause(USER_ERROR_GRACE_SECONDS if same_on_all_ranks else SAME_ERROR_SECONDS)
        if same_on_all_ranks and self.rank == 0:
            return self._report(self.rank, str(error), code, name_rank=False)
        return self._report(self.rank, format_error(error), code)

    def _secondary_failure(self, text: str, code: int) -> int:
        """Report a rank that was killed, or this one where no other is the cause; return the exit code."""
        with suppress(OSError):  # a full disk, or the folder is gone
            replace(this_process(), ending=True).write(self.files.process(self.rank))
        end = time.monotonic() + self._cause_timeout()
        while time.monotonic() < end:
            if cause := self._cause():
                return self._defer_to(cause)
            if dead := self._dead_ranks():
                which = f"ranks {', '.join(map(str, dead))}" if len(dead) > 1 else "it"
                return self._report(dead[0], f"{which} ended without an error message (killed? out of memory?)", code)
            time.sleep(POLL_SECONDS)
        if not self.files.path.exists():  # the run folder was removed, which rank 0 reports
            logger.error("rank %d ended: %s", self.rank, text)
            return code
        if waiting := [f"{rank} on {other.host}" for rank, other in self._other_ranks().items() if not other.ending]:
            text += f" (no response from rank {', rank '.join(waiting)})"
        return self._report(self.rank, text, code)

    def _cause_timeout(self) -> float:
        """Return the seconds within which the cause of a secondary failure can be expected to show."""
        remote = any(other.machine != this_process().machine for other in self._other_ranks().values())
        return REMOTE_CAUSE_SECONDS if remote else CAUSE_SECONDS

    def _other_ranks(self) -> dict[int, RankProcess]:
        """Return the other ranks that have not ended in an orderly way."""
        ranks = (rank for rank in range(self.world_size) if rank != self.rank)
        found = {rank: RankProcess.read(self.files.process(rank)) for rank in ranks}
        return {rank: process for rank, process in found.items() if process is not None}

    def _dead_ranks(self) -> list[int]:
        """Return the ranks of this machine that were killed."""
        dead = (rank for rank, other in self._local_ranks.items() if not is_alive(other))
        # check again: a rank that ends in an orderly way removes its file, then exits
        return [rank for rank in dead if self.files.process(rank).exists()]

    def _cause(self) -> FirstFailure | None:
        """Return the first_failure.json of this attempt."""
        try:
            # both times are the file system's, whatever the clocks of the machines say
            if self.files.first_failure.stat().st_mtime < self._begun - STALE_SECONDS:
                return None
        except OSError:
            return None
        return read_first_failure(self.files.first_failure)

    def _wait_for_cause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._cause():
            time.sleep(POLL_SECONDS)

    def _defer_to(self, cause: FirstFailure) -> int:
        self.on_failure(f"rank {cause.rank}: {cause.text}", cause.code)
        logger.error("rank %d ended because of rank %s: %s", self.rank, cause.rank, cause.text)
        return cause.code

    def _report(self, rank: int, text: str, code: int, *, name_rank: bool = True) -> int:
        """Print the failure of ``rank`` unless a rank has reported before; return the exit code of the whole run."""
        try:
            FirstFailure(rank, text, code, self.rank).write_once(self.files.first_failure)
        except FileExistsError:
            if earlier := self._cause():
                return self._defer_to(earlier)
        except OSError as error:  # a full disk, for example: two reports are better than none
            logger.error("cannot write %s: %s", self.files.first_failure, error)
        self._print_error(text + self._log_hint(rank) if name_rank else text, f" on rank {rank}" if name_rank else "")
        self.on_failure(f"rank {rank}: {text}" if name_rank else text, code)
        return code

    def _log_hint(self, rank: int) -> str:
        return f"\n  log of rank {rank}: {self.paths.log(rank)}"

    def _print_error(self, text: str, where: str = "") -> None:
        # the launcher that read stderr may have been killed; the logs hold everything
        with suppress(OSError):
            # one write, so that the lines of several ranks do not mix
            sys.stderr.write(f"error{where}: {text}\n")
            sys.stderr.flush()

    def _on_wakeup(self, signals: bytes | None) -> None:
        """In the listener's thread: end this process when a signal says so, or when another rank has failed."""
        reason, code = self._exit_reason(signals)
        if code and self._ending.acquire(blocking=False):
            self.exit_now(self._end_from_thread(reason, code))

    def _exit_reason(self, signals: bytes | None) -> tuple[str, int]:
        """Return why this process should end, and its exit code; 0 for no reason."""
        for number in signals or b"":
            if number == signal.SIGINT or (number == signal.SIGTERM and self._sigterm_ends_process()):
                name = HANDLED_SIGNALS[number]
                return f"ended by {name}, sent by the launcher or a user", 128 + number
        if signals is None and self._another_rank_failed():
            return "another rank failed", FAILED
        return "", 0

    def _another_rank_failed(self) -> bool:
        return bool(self._cause() or self._dead_ranks())

    def _sigterm_ends_process(self) -> bool:
        """Return whether a SIGTERM that has just arrived ends this process; otherwise make it a stop request."""
        if self.stop_signals.is_repeated_sigterm():
            return True
        if not self.sigterm_from_scheduler and not self._joined:
            return True
        end = time.monotonic() + (0.0 if self.sigterm_from_scheduler else self._cause_timeout())
        while not self._another_rank_failed():
            if time.monotonic() >= end:
                logger.warning("rank %d is asked to stop by SIGTERM", self.rank)
                self.stop_signals.request_stop(signal.SIGTERM.name)
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _end_from_thread(self, reason: str, code: int) -> int:
        """Log the stacks and find the cause, while the main thread works or waits; return the exit code."""
        logger.error("rank %d ends: %s; stack traces of its threads:", self.rank, reason)
        faulthandler.dump_traceback(self._crash_log)
        # before the ranks have met, their files may be of an earlier attempt
        return self._secondary_failure(reason, code) if self._joined else code
