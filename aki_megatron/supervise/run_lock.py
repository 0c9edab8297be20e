"""One start at a time per run folder: the file RUNNING names the process that trains in it.

RUNNING is created exclusively, which works on network file systems too, and its holder touches it every BEAT_SECONDS.
A holder of this machine is dead when its process is gone; one of another machine when the file is not touched for
STALE_SECONDS, measured by the clock of the file system. The file of a dead holder is taken over.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aki_megatron.errors import ConfigError
from aki_megatron.supervise.json_record import read_record
from aki_megatron.supervise.process import RankProcess, is_alive, this_process
from aki_megatron.supervise.run_paths import RunPaths

BEAT_SECONDS = 5.0
"""How often the holder touches the file."""

STALE_SECONDS = 45.0
"""A file of another machine that is not touched for so long is of a dead holder."""

POLL_SECONDS = 0.5

JOIN_SECONDS = 2.0
"""How long ``release`` waits for the thread, which a file system that does not answer may hold."""

UNREADABLE_SECONDS = 2.0
"""A file that its creator has not filled for so long never will be: the creator was killed, or the disk was full."""


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a run folder: rank 0 of a start."""

    host: str
    machine: str
    pid: int
    start_ticks: int
    attempt: str
    start_id: str
    """What the ranks of one start have in common (Launch.start_id)."""
    since: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    token: str = field(default_factory=lambda: uuid.uuid4().hex)

    @classmethod
    def of_this_process(cls, attempt: str, start_id: str) -> "LockHolder":
        """Describe the calling process."""
        own = this_process()
        return cls(own.host, own.machine, own.pid, own.start_ticks, attempt, start_id)

    @property
    def process(self) -> RankProcess:
        """The process, to find out whether it is alive."""
        return RankProcess(self.host, self.machine, self.pid, self.start_ticks)

    @property
    def is_on_this_machine(self) -> bool:
        """Whether this process can see the holder's."""
        return bool(self.machine) and self.machine == this_process().machine

    def describe(self) -> str:
        """Name the process."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


def read_holder(paths: RunPaths) -> LockHolder | None:
    """Return who holds a run folder, dead or alive; None where the file is missing or unreadable."""
    return read_record(LockHolder, paths.running)


class RunLock:
    """The run folder is this process's, from ``acquire`` to ``release``; on rank 0.

    on_lost  called in a thread with a sentence when the folder was removed, or another start has taken it over
    """

    def __init__(
        self,
        paths: RunPaths,
        attempt: str,
        start_id: str,
        *,
        on_waiting: Callable[[str], None],
        in_use: Callable[[RunPaths, LockHolder], ConfigError] | None = None,
    ) -> None:
        """Create the lock of a start.

        on_waiting  told when ``acquire`` must wait to see whether a holder on another machine is alive
        in_use      returns the error about a folder that another process holds; None: that of a training run
        """
        self.paths = paths
        self._in_use = in_use or _in_use
        self.holder = LockHolder.of_this_process(attempt, start_id)
        self.on_waiting = on_waiting
        self._on_lost: Callable[[str], None] = lambda text: None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the run folder. Raises ConfigError that names the process that holds it."""
        while not self._create():
            found = _file_id(self.paths.running)
            self._wait_until_dead()
            self._remove_dead(found)
        self._folder_id = _id_of(self.paths.path)
        self._thread = threading.Thread(target=self._run, name="run lock", daemon=True)
        self._thread.start()

    def watch(self, on_lost: Callable[[str], None]) -> None:
        """Call ``on_lost`` from now on when the folder is not this process's any more."""
        self._on_lost = on_lost

    def release(self) -> None:
        """Give the folder back; does nothing the second time, or where another start has it."""
        if self._thread is None or os.getpid() != self.holder.pid:  # a forked child does not hold it
            return
        self._released.set()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)
        self._thread = None
        if self._read_token() == self.holder.token:
            with suppress(OSError):
                self.paths.running.unlink(missing_ok=True)

    def lost(self) -> str:
        """Return why the folder is not this process's any more; empty where it is. Creates a file that is missing."""
        try:
            if _id_of(self.paths.path) != self._folder_id:
                return f"the run folder {self.paths.path} was replaced while the run trained in it"
        except FileNotFoundError:
            return f"the run folder {self.paths.path} was removed while the run trained in it"
        token = self._read_token()
        with suppress(OSError):  # a full disk: the next look may succeed
            if token == self.holder.token or (token is None and self._create()):
                return ""
        other = read_holder(self.paths)
        if other is None or other.token == self.holder.token:
            return ""  # in the middle of being written: the next look tells
        return f"another start has taken over the run folder {self.paths.path}: {other.describe()}"

    def _create(self) -> bool:
        """Create the file; return whether it was missing."""
        try:
            handle = os.open(self.paths.running, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(handle, (json.dumps(asdict(self.holder)) + "\n").encode())
        except OSError:
            self.paths.running.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        return True

    def _wait_until_dead(self) -> None:
        """Return when the holder is dead. Raises ConfigError when it is alive."""
        holder = self._read_other()
        if holder is not None and holder.is_on_this_machine:
            if is_alive(holder.process):
                raise self._in_use(self.paths, holder)
            return
        age = self._age()
        if holder is None or age is None or age > STALE_SECONDS:
            return
        self.on_waiting(
            f"{self.paths.path} was in use by {holder.describe()}: waiting {STALE_SECONDS - age:.0f} s at most to see "
            "whether that process is alive"
        )
        while (newer := self._age()) is not None and newer < STALE_SECONDS:
            if newer < age:
                raise self._in_use(self.paths, holder)
            age = newer
            time.sleep(POLL_SECONDS)

    def _read_other(self) -> LockHolder | None:
        """Return the holder; None where the file is gone, or was never filled."""
        end = time.monotonic() + UNREADABLE_SECONDS
        while (holder := read_holder(self.paths)) is None and self.paths.running.exists():
            if time.monotonic() > end:
                break
            time.sleep(POLL_SECONDS / 10)
        return holder

    def _remove_dead(self, dead: tuple[int, ...] | None) -> None:
        """Remove the file ``dead`` of a dead holder, and no other: several starts may find it at the same time."""
        if dead is None or _file_id(self.paths.running) != dead:
            return
        aside = self.paths.running.with_suffix(f".{self.holder.token}")
        try:
            self.paths.running.rename(aside)
        except FileNotFoundError:
            return
        if _file_id(aside) != dead:  # another start was faster, within microseconds
            with suppress(OSError):
                os.link(aside, self.paths.running)
        aside.unlink(missing_ok=True)

    def _age(self) -> float | None:
        """Return the seconds since the file was touched, by the file system's clock; None where it is gone."""
        probe = self.paths.running.with_suffix(f".{self.holder.token}")
        try:
            # to open a file revalidates what a network file system has cached about it
            with self.paths.running.open() as file:
                touched = os.fstat(file.fileno()).st_mtime
            with probe.open("w") as file:
                file.write("\n")
                file.flush()
                now = os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None
        finally:
            probe.unlink(missing_ok=True)
        return max(0.0, now - touched)

    def _read_token(self) -> str | None:
        """Return the token in the file: None where there is no file, "" where it cannot be read."""
        if (holder := read_holder(self.paths)) is not None:
            return holder.token
        return "" if self.paths.running.exists() else None

    def _run(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                if text := self.lost():
                    self._on_lost(text)
                    return
                os.utime(self.paths.running)
            except OSError:
                pass  # a full disk or a network file system that does not answer: the next beat may succeed


def _file_id(path: Path) -> tuple[int, ...] | None:
    """Return what tells a file from another of its name, and from itself once it is touched; None for no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _id_of(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def check_not_held_by_another(paths: RunPaths, start_id: str) -> None:
    """Raise ConfigError where a live process of another start holds the run folder; for ranks other than 0."""
    holder = read_holder(paths)
    if holder is not None and holder.start_id != start_id and holder.is_on_this_machine and is_alive(holder.process):
        raise _in_use(paths, holder)


def _in_use(paths: RunPaths, holder: LockHolder) -> ConfigError:
    return ConfigError(
        f"{paths.path} is in use: a run trains there ({holder.describe()}, attempt {holder.attempt}). Wait for its "
        f"end, stop it (touch {paths.stop}), or give this run a folder of its own (--run.dir). If that process is "
        f"dead, delete {paths.running} and start again."
    )
