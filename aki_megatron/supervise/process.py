"""Who a rank is, in a file that other ranks read when it may be dead."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

_STATE, _STARTED = 0, 19
"""Places in /proc/PID/stat, counted after the name of the program (man 5 proc)."""


@dataclass(frozen=True)
class Process:
    """A process, as others can find it."""

    host: str
    machine: str
    """Boot and process-id namespace: where two are equal, each can look for the other by ``pid``; empty if unknown."""
    pid: int
    started: int
    """Clock ticks since boot: tells a process from a later one with the same number."""
    ending: bool = False
    """It has met an error and looks for the cause."""

    def write(self, path: Path) -> None:
        """Write the file, in place: network filesystems show that at once."""
        path.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Process | None":
        """What the file says; None where there is none, or where it is just being written."""
        try:
            facts: dict[str, Any] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return cls(**facts)


def this_process() -> Process:
    """This one."""
    return _process(os.getpid())


@cache
def _process(pid: int) -> Process:
    host = platform.node()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return Process(host, "", pid, 0)
    return Process(host, machine, pid, int(_stat(pid)[_STARTED]))


def is_alive(process: Process) -> bool:
    """Whether a process runs; True where this one cannot know, as on another machine."""
    if not process.machine or process.machine != this_process().machine:
        return True
    try:
        stat = _stat(process.pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[_STATE] not in "ZX" and int(stat[_STARTED]) == process.started


def _stat(pid: int) -> list[str]:
    # the name, in brackets, may hold anything
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
