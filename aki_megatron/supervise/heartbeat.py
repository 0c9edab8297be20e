"""Heartbeats: a small file per rank with its step and phase, and the choice of the straggler.

No torch here: tools read heartbeats, also those of other machines.
"""

import json
import os
import platform
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aki_megatron.supervise.json_record import read_record
from aki_megatron.supervise.run_paths import RunPaths


@dataclass(frozen=True)
class Heartbeat:
    """Progress of one rank."""

    rank: int
    step: int
    """Optimizer steps done."""
    phase: str
    """What the rank is doing."""
    since: float
    """Start of the phase, seconds since the epoch."""
    num_phases: int = 0
    """Phases entered since the last step."""
    collective: str = ""
    """Function in which the rank waits for other ranks; filled in only once a hang was detected."""
    step_seconds: float = 0.0
    """Median duration of recent steps, data and callbacks included; 0 before the second step."""
    hang_detected: bool = False
    """The rank knows of a hang and has written its stack traces."""
    time: float = field(default_factory=time.time)
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)

    def write(self, path: Path) -> None:
        """Write the file in place: network file systems show that at once."""
        path.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Heartbeat | None":
        """Read a heartbeat; None where the file is missing, damaged, or in the middle of being written."""
        return read_record(cls, path)

    def same_phase(self, other: "Heartbeat") -> bool:
        """Return whether two ranks are at the same point of the run."""
        return (self.step, self.phase, self.collective) == (other.step, other.phase, other.collective)

    def describe(self) -> str:
        """Describe the phase in words."""
        text = f"in {self.phase!r} for {max(0.0, self.time - self.since):.0f} s after step {self.step}"
        return text + (f", waiting for other ranks in {self.collective}" if self.collective else "")


def read_heartbeats(paths: RunPaths, world_size: int) -> dict[int, Heartbeat]:
    """Return the heartbeats by rank, for the ranks that have one."""
    found = {rank: Heartbeat.read(paths.heartbeat(rank)) for rank in range(world_size)}
    return {rank: heartbeat for rank, heartbeat in found.items() if heartbeat is not None}


def straggler(heartbeats: Iterable[Heartbeat]) -> Heartbeat:
    """Return the rank for which the others most likely wait; ``heartbeats`` are of live ranks, at least one.

    It has done the fewest steps. Ties are broken in favour of a rank that waits in no collective, then of the one that
    entered the fewest phases since the step, then of the one that entered its phase first (last, because the clocks of
    machines differ a little).
    """
    return min(heartbeats, key=lambda beat: (beat.step, beat.collective != "", beat.num_phases, beat.since, beat.rank))


def format_ranks(ranks: Collection[int]) -> str:
    """Return ``rank 3`` or ``ranks 3, 4, 5``."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))
