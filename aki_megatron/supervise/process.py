"""Identify the process of a rank in a file, so that other ranks can tell whether it is alive."""

import json
import os
import platform
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from aki_megatron.supervise.json_record import read_record

_STATE, _START_TICKS = 0, 19
"""Fields of /proc/PID/stat, counted after the name of the program (man 5 proc)."""


@dataclass(frozen=True)
class RankProcess:
    """A process, as other ranks can find it."""

    host: str
    machine: str
    """Boot id and process-id namespace: where they are equal, a ``pid`` means the same. Empty if unknown."""
    pid: int
    start_ticks: int
    """Clock ticks since boot: distinguishes the process from a later one with the same ``pid``."""
    ending: bool = False
    """The process has failed and is looking for the cause."""

    def write(self, path: Path) -> None:
        """Write the file in place: network file systems show that at once."""
        path.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> "RankProcess | None":
        """Read the file; None where it is missing, damaged, or in the middle of being written."""
        return read_record(cls, path)


def this_process() -> RankProcess:
    """Describe the calling process."""
    return _process(os.getpid())


@cache
def _process(pid: int) -> RankProcess:
    host = platform.node()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return RankProcess(host, "", pid, 0)
    return RankProcess(host, machine, pid, int(_stat(pid)[_START_TICKS]))


def is_alive(process: RankProcess) -> bool:
    """Return whether a process runs; True where this process cannot know, as on another machine."""
    if not process.machine or process.machine != this_process().machine:
        return True
    try:
        stat = _stat(process.pid)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[_STATE] not in "ZX" and int(stat[_START_TICKS]) == process.start_ticks


def _stat(pid: int) -> list[str]:
    # the name of the program, in parentheses, may contain anything
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
