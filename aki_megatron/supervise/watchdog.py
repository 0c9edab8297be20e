"""The watch over a run: a heartbeat per rank, and the end of a run that hangs, with the rank that lags named.

The main thread says where it is (ProgressTracker); a thread beside it (Watchdog) writes that down and looks at the clock. When a
rank has not done a step for longer than is allowed, it makes <run.dir>/heartbeat/hang. Every rank that sees the file
writes its stacks to logs/hang_rank_N.txt and says so in its heartbeat. A rank that does not is *silent*: stopped, or
its machine is gone. If all answer, one *lags*: the others wait for it. The lowest rank that answered names it, and all
ranks end by the one message of supervise/failure.py.
"""

import faulthandler
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import FrameType

from aki_megatron.config.run import WatchConfig
from aki_megatron.supervise.events import record
from aki_megatron.supervise.heartbeat import Heartbeat, describe_ranks, lagging, read_heartbeats
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.loop import Callback
from aki_megatron.types import StepReport

logger = logging.getLogger("aki_megatron.train")

LOOK_SECONDS = 1.0
"""How often the thread looks, and writes a heartbeat if anything changed."""

QUIET_SECONDS = 10.0
"""A heartbeat is written this often though nothing changed."""

ANSWER_SECONDS = 20.0
"""A rank that has not written its stacks so long after a hang was noticed is silent."""

DEPUTY_SECONDS = 10.0
"""So much longer a rank waits for a lower one, which has answered, to speak; then it speaks itself."""

MEASURED_STEPS = 50
"""Steps whose median duration is the measure."""

WAITS = ("torch.distributed.distributed_c10d", "aki_megatron.parallel.p2p_communication")
"""Modules whose functions wait for other ranks."""

SLOW_PLACES = {"starts", "saves a checkpoint", "goes back to a checkpoint", "ends"}
"""Where the main thread may stay for watch.init_timeout."""


def collective_seconds(watch: WatchConfig) -> float:
    """Longest wait in a collective: longer than any hang, so that the watch, which knows who lags, speaks first."""
    return watch.init_timeout + 2 * (ANSWER_SECONDS + DEPUTY_SECONDS)


class ProgressTracker(Callback):
    """Where this rank stands: its main thread tells, any thread may look. The first of the callbacks."""

    def __init__(self, watch: WatchConfig) -> None:
        self._watch = watch
        self._durations: deque[float] = deque(maxlen=MEASURED_STEPS)
        self._first, self._slow = True, False
        self.step = self.moves = 0
        self.at("starts")

    def at(self, place: str) -> None:
        """Say what this rank does from now on."""
        slow = place in SLOW_PLACES
        if slow or self._slow:  # what is slow is no part of a step
            self._began = time.monotonic()
        self._slow = slow
        self.moves += 1
        self.where = (place, time.time())  # one assignment: another thread reads it

    def forgive(self, seconds: float) -> None:
        """The process itself was stopped for so long, and with it, probably, all others: that is no hang."""
        self._began += seconds

    def on_start(self, step: int) -> None:
        """The first step, which may take long, begins."""
        self.step, self._first, self._began = step, True, time.monotonic()

    def after_step(self, step: int, report: StepReport) -> None:
        """A step is done."""
        now = time.monotonic()
        if not self._first:
            self._durations.append(now - self._began)
        self.step, self.moves, self._first, self._began = step, 0, False, now

    def on_rollback(self, step: int) -> None:
        """Fewer steps are done than were."""
        self.step = step

    @property
    def step_seconds(self) -> float:
        """Median duration of the last steps, data and callbacks included; 0 before there is one."""
        return median(self._durations) if self._durations else 0.0

    @property
    def passed(self) -> float:
        """Seconds since the last step, or since what takes long began."""
        return time.monotonic() - self._began

    @property
    def allowed(self) -> float:
        """Seconds that may pass before that is a hang."""
        if self._slow or self._first:
            return self._watch.init_timeout
        usual = max(self._watch.step_timeout, self._watch.step_timeout_factor * self.step_seconds)
        return min(usual, self._watch.init_timeout)


class Watchdog:
    """Writes this rank's heartbeat and notices hangs, in a thread from ``begin`` to ``end``."""

    def __init__(
        self, folder: RunPaths, rank: int, world_size: int, pulse: ProgressTracker, accuse: Callable[[int, str], None]
    ) -> None:
        """``accuse(rank, text)`` ends this process, and with it all others, because of ``rank``."""
        self.folder = folder
        self.rank = rank
        self.world_size = world_size
        self.pulse = pulse
        self.accuse = accuse
        self._ended = threading.Event()
        self._written = Heartbeat(rank, -1, "", 0.0, time=0.0)
        self._waits, self._noticed = "", 0.0
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def begin(self) -> None:
        """Forget earlier attempts and start. Call before joining the other ranks, when the folder of logs exists."""
        self.folder.heartbeats.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            self.folder.hang.unlink(missing_ok=True)
            ours = {self.folder.heartbeat(rank) for rank in range(self.world_size)}
            for path in set(self.folder.heartbeats.glob("rank_*.json")) - ours:
                path.unlink()
        self._stacks = self.folder.hang_stacks(self.rank).open("a")
        self._beat()
        self._begun = self.folder.heartbeat(self.rank).stat().st_mtime
        self._thread.start()

    def end(self) -> None:
        """The run has ended well, or in a way that others speak of."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        if not (path := self.folder.hang_stacks(self.rank)).stat().st_size:  # else of an earlier attempt
            path.unlink()

    def _run(self) -> None:
        looked, complained = time.monotonic(), False
        while not self._ended.wait(LOOK_SECONDS):
            slept = time.monotonic() - looked
            if slept > QUIET_SECONDS:
                self.pulse.forgive(slept)
            looked += slept
            try:
                self._look()
            except OSError as error:  # a full disk, say: the run goes on, and so does the watch
                if not complained:
                    logger.error("the watch cannot write: %s", error)
                complained = True
            if self._noticed:
                self._conclude()

    def _look(self) -> None:
        left = self.pulse.allowed - self.pulse.passed
        if not self._noticed and (left < 0 or self._is_new(self.folder.hang)):
            self._notice()
        if not self._noticed:
            # from a thread without Python: this one cannot run where native code hangs and keeps the interpreter
            faulthandler.dump_traceback_later(left + ANSWER_SECONDS, file=self._stacks)
        self._beat()

    def _is_new(self, path: Path) -> bool:
        """Whether a file is there and of this attempt. Both times are the file system's, whatever the clocks say."""
        try:
            return path.stat().st_mtime >= self._begun
        except OSError:
            return False

    def _beat(self) -> None:
        """Write the heartbeat if anything changed, or if the last one is old."""
        beat = self._state()
        if beat.time - self._written.time > QUIET_SECONDS or replace(beat, time=self._written.time) != self._written:
            beat.write(self.folder.heartbeat(self.rank))
            self._written = beat

    def _state(self) -> Heartbeat:
        place, since = self.pulse.where
        return Heartbeat(
            self.rank,
            self.pulse.step,
            place,
            since,
            self.pulse.moves,
            waits=self._waits,
            step_seconds=round(self.pulse.step_seconds, 4),
            hang_noticed=bool(self._noticed),
        )

    def _notice(self) -> None:
        """Tell all ranks that there is a hang, and write down where this one is."""
        pulse, self._noticed = self.pulse, time.monotonic()
        self.folder.hang.touch()
        self._waits = waits_in(_main_frame())
        text = f"no step for {pulse.passed:.0f} s after step {pulse.step}; in {pulse.where[0]!r}"
        logger.error("hang noticed: %s", text)
        self._stacks.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.rank}: {text}; its threads:\n")
        self._stacks.flush()
        faulthandler.dump_traceback(self._stacks)

    def _conclude(self) -> None:
        """Name a rank and end, if it is this rank's turn."""
        waited = time.monotonic() - self._noticed
        beats = read_heartbeats(self.folder, self.world_size)
        answered = {
            rank: beat
            for rank, beat in beats.items()
            if beat.hang_noticed and self._is_new(self.folder.heartbeat(rank))
        } | {self.rank: self._state()}
        if len(answered) < self.world_size and waited < ANSWER_SECONDS:
            return
        if self.rank > min(answered) and waited < ANSWER_SECONDS + DEPUTY_SECONDS:
            return
        rank, what = self._blame(beats, answered)
        text = f"no step for {self.pulse.passed:.0f} s ({self.pulse.allowed:.0f} s are allowed); {what}"
        with suppress(OSError):  # the end of the run matters more than a line
            record(self.folder, self.pulse.step, "hang", text)
        self._ended.set()
        self.accuse(rank, f"hang: {text}\n  stacks of the ranks that answered: {self.folder.logs}/hang_rank_*.txt")

    def _blame(self, beats: Mapping[int, Heartbeat], answered: Mapping[int, Heartbeat]) -> tuple[int, str]:
        """The rank for which the others wait, and why it is that one."""
        silent = sorted(set(range(self.world_size)) - answered.keys())
        if not silent:
            last = lagging(answered.values())
            there = [beat.rank for beat in answered.values() if beat != last and beat.is_where(last)]
            also = f"; {describe_ranks(there)} came to the same place later" if there else ""
            return last.rank, f"rank {last.rank} on {last.host} lags: {last.describe()}{also}"
        text = f"{describe_ranks(silent)} {'is' if len(silent) == 1 else 'are'} silent (stopped? machine gone?)"
        if silent[0] not in beats:
            return silent[0], f"{text}; rank {silent[0]} never started"
        seen = beats[silent[0]]
        where = f"rank {seen.rank} on {seen.host} was last seen in {seen.place!r} after step {seen.step}"
        return seen.rank, f"{text}; {where}"


def _main_frame() -> FrameType | None:
    """Where the main thread is."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def waits_in(frame: FrameType | None) -> str:
    """The function in which a thread waits for other ranks; empty where it does not."""
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module in WAITS or (module.startswith("deepspeed.") and name == "wait"):
            return name
        frame = frame.f_back
    return ""
