"""Write a heartbeat per rank, and end a run that hangs with the straggler named.

The main thread reports its phase to the ProgressTracker; the Watchdog's thread writes that to the heartbeat and checks
the time. When a step takes longer than its timeout, the rank creates <run.dir>/heartbeat/hang. Every rank that sees
the file writes its stack traces to logs/hang_rank_N.txt and says so in its heartbeat. A rank that does not is
*unresponsive*: suspended, or its machine is down. If all respond, one is the *straggler* for which the others wait. The
lowest rank that responded names it, and all ranks end with the one error of supervise/failure.py.
"""

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType

from aki_megatron.config.run import WatchConfig
from aki_megatron.supervise.events import record_event
from aki_megatron.supervise.heartbeat import Heartbeat, format_ranks, read_heartbeats, straggler
from aki_megatron.supervise.progress import ProgressTracker
from aki_megatron.supervise.run_paths import RunPaths

logger = logging.getLogger("aki_megatron.supervise")

POLL_SECONDS = 1.0
"""How often the thread wakes up, and writes a heartbeat if anything changed."""

HEARTBEAT_SECONDS = 10.0
"""A heartbeat is written at least this often."""

RESPONSE_SECONDS = 20.0
"""A rank that has not written its stack traces this long after a hang was detected is unresponsive."""

TAKEOVER_SECONDS = 10.0
"""A rank waits this much longer for a lower one, which has responded, to report; then it reports itself."""

BLOCKING_MODULES = ("torch.distributed.distributed_c10d", "aki_megatron.parallel.p2p_communication")
"""Modules whose functions wait for other ranks."""


def collective_timeout(watch: WatchConfig) -> float:
    """Return the timeout of collectives, in seconds: longer than the watchdog, which names the straggler, needs."""
    return watch.init_timeout + 2 * (RESPONSE_SECONDS + TAKEOVER_SECONDS)


class Watchdog:
    """Write this rank's heartbeat and detect hangs, in a thread from ``begin`` to ``end``."""

    def __init__(
        self,
        paths: RunPaths,
        rank: int,
        world_size: int,
        tracker: ProgressTracker,
        report_rank_failure: Callable[[int, str], None],
    ) -> None:
        """Create the watchdog of one rank.

        report_rank_failure  takes a rank and what it did; ends this process, and with it all others
        """
        self.paths = paths
        self.rank = rank
        self.world_size = world_size
        self.tracker = tracker
        self.report_rank_failure = report_rank_failure
        self._ended = threading.Event()
        self._last_written = Heartbeat(rank, -1, "", 0.0, time=0.0)
        self._collective, self._hang_detected = "", 0.0
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def begin(self) -> None:
        """Remove what earlier attempts left and start. Call it before joining other ranks; the log folder exists."""
        self.paths.heartbeats.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.paths.hang.unlink(missing_ok=True)
            current = {self.paths.heartbeat(rank) for rank in range(self.world_size)}
            for path in set(self.paths.heartbeats.glob("rank_*.json")) - current:
                path.unlink()
        self._stacks = self.paths.hang_stacks(self.rank).open("a")
        self._write_heartbeat()
        self._begun = self.paths.heartbeat(self.rank).stat().st_mtime
        self._thread.start()

    def end(self) -> None:
        """Stop the thread: the run has ended, or another rank reports its failure."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        with suppress(OSError):  # a full disk, or the folder is gone
            self._stacks.close()
            if not (path := self.paths.hang_stacks(self.rank)).stat().st_size:  # otherwise it is of an earlier attempt
                path.unlink()

    def _run(self) -> None:
        last_poll, logged = time.monotonic(), False
        while not self._ended.wait(POLL_SECONDS):
            slept = time.monotonic() - last_poll
            if slept > HEARTBEAT_SECONDS:
                self.tracker.add_grace(slept)
            last_poll += slept
            try:
                self._poll()
            except OSError as error:  # a full disk, for example: the run continues, and so does the watchdog
                if not logged:
                    logger.error("the watchdog cannot write: %s", error)
                logged = True
            if self._hang_detected:
                self._end_run()

    def _poll(self) -> None:
        remaining = self.tracker.timeout - self.tracker.elapsed
        if not self._hang_detected and (remaining < 0 or self._is_of_this_attempt(self.paths.hang)):
            self._on_hang()
        if not self._hang_detected:
            # from a thread without Python: this one cannot run where native code hangs while holding the interpreter
            faulthandler.dump_traceback_later(remaining + RESPONSE_SECONDS, file=self._stacks)
        self._write_heartbeat()

    def _is_of_this_attempt(self, path: Path) -> bool:
        """Return whether a file exists and is not older than this attempt, by the file system's clock."""
        try:
            return path.stat().st_mtime >= self._begun
        except OSError:
            return False

    def _write_heartbeat(self) -> None:
        """Write the heartbeat if anything changed, or if the last one is old."""
        heartbeat, last = self._heartbeat(), self._last_written
        if heartbeat.time - last.time > HEARTBEAT_SECONDS or replace(heartbeat, time=last.time) != last:
            heartbeat.write(self.paths.heartbeat(self.rank))
            self._last_written = heartbeat

    def _heartbeat(self) -> Heartbeat:
        phase, since = self.tracker.phase
        return Heartbeat(
            self.rank,
            self.tracker.step,
            phase,
            since,
            self.tracker.num_phases,
            collective=self._collective,
            step_seconds=round(self.tracker.step_seconds, 4),
            hang_detected=bool(self._hang_detected),
        )

    def _on_hang(self) -> None:
        """Tell all ranks of the hang, and write the stack traces of this one."""
        tracker, self._hang_detected = self.tracker, time.monotonic()
        self.paths.hang.touch()
        self._collective = blocking_function(_main_frame())
        text = f"no step for {tracker.elapsed:.0f} s after step {tracker.step}; in {tracker.phase[0]!r}"
        logger.error("hang detected: %s", text)
        self._stacks.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank}: {text}; stack traces:\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks)

    def _end_run(self) -> None:
        """Name the rank that caused the hang and end, if this rank is the one to report."""
        waited = time.monotonic() - self._hang_detected
        heartbeats = read_heartbeats(self.paths, self.world_size)
        responded = {
            rank: heartbeat
            for rank, heartbeat in heartbeats.items()
            if heartbeat.hang_detected and self._is_of_this_attempt(self.paths.heartbeat(rank))
        } | {self.rank: self._heartbeat()}
        if len(responded) < self.world_size and waited < RESPONSE_SECONDS:
            return
        if self.rank > min(responded) and waited < RESPONSE_SECONDS + TAKEOVER_SECONDS:
            return
        rank, reason = self._find_straggler(heartbeats, responded)
        text = f"no step for {self.tracker.elapsed:.0f} s (timeout: {self.tracker.timeout:.0f} s); {reason}"
        with suppress(OSError):  # ending the run matters more than a line
            record_event(self.paths, self.tracker.step, "hang", text)
        self._ended.set()
        stacks = f"{self.paths.logs}/hang_rank_*.txt"
        self.report_rank_failure(rank, f"hang: {text}\n  stack traces of the ranks that responded: {stacks}")

    def _find_straggler(
        self, heartbeats: Mapping[int, Heartbeat], responded: Mapping[int, Heartbeat]
    ) -> tuple[int, str]:
        """Return the rank for which the others wait, and the reason to name it."""
        unresponsive = sorted(set(range(self.world_size)) - responded.keys())
        if not unresponsive:
            last = straggler(responded.values())
            followers = [beat.rank for beat in responded.values() if beat != last and beat.same_phase(last)]
            later = f"; {format_ranks(followers)} entered the same phase later" if followers else ""
            return last.rank, f"rank {last.rank} on {last.host} is the straggler: {last.describe()}{later}"
        verb = "is" if len(unresponsive) == 1 else "are"
        text = f"{format_ranks(unresponsive)} {verb} unresponsive (suspended? machine down?)"
        if unresponsive[0] not in heartbeats:
            return unresponsive[0], f"{text}; rank {unresponsive[0]} never started"
        seen = heartbeats[unresponsive[0]]
        where = f"rank {seen.rank} on {seen.host} was last seen in {seen.phase!r} after step {seen.step}"
        return seen.rank, f"{text}; {where}"


def _main_frame() -> FrameType | None:
    """Return the current frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def blocking_function(frame: FrameType | None) -> str:
    """Return the function in which a thread waits for other ranks; empty where it does not."""
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module in BLOCKING_MODULES or (module.startswith("deepspeed.") and name == "wait"):
            return name
        frame = frame.f_back
    return ""
