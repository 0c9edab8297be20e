"""Heartbeats: a small file per rank that says where it stands, and which rank the others wait for.

No torch here: tools look at runs, also at those of other machines.
"""

import json
import os
import platform
import time
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aki_megatron.supervise.run_paths import RunPaths


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank stands."""

    rank: int
    step: int
    """Optimizer steps that are done."""
    place: str
    """What it does now."""
    since: float
    """Seconds since the epoch when it came there."""
    moves: int = 0
    """Places in which it has been since the last step."""
    waits: str = ""
    """The collective in which it waits for other ranks; known only once a hang was noticed."""
    step_seconds: float = 0.0
    """Median duration of the last steps with all that comes between them; 0 before there is one."""
    hang_noticed: bool = False
    """It knows of a hang and has written its stacks."""
    time: float = field(default_factory=time.time)
    host: str = field(default_factory=platform.node)
    pid: int = field(default_factory=os.getpid)

    def write(self, path: Path) -> None:
        """Write the file, in place: network filesystems show that at once."""
        path.write_text(json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Heartbeat | None":
        """What the file says; None where there is none, where it is just being written, or cannot be read."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError):
            return None

    def is_where(self, other: "Heartbeat") -> bool:
        """Whether two ranks are at the same point of the run."""
        return (self.step, self.place, self.waits) == (other.step, other.place, other.waits)

    def describe(self) -> str:
        """Where the rank stands, for a person."""
        where = f"in {self.place!r} for {max(0.0, self.time - self.since):.0f} s after step {self.step}"
        return where + (f", waiting for others in {self.waits}" if self.waits else "")


def read_heartbeats(folder: RunPaths, world_size: int) -> dict[int, Heartbeat]:
    """Heartbeats of all ranks that have one."""
    found = {rank: Heartbeat.read(folder.heartbeat(rank)) for rank in range(world_size)}
    return {rank: beat for rank, beat in found.items() if beat is not None}


def lagging(beats: Iterable[Heartbeat]) -> Heartbeat:
    """The rank for which the others wait, as far as one can tell; ``beats`` are those of living ranks, at least one.

    It has done the fewest steps; among equals it is one that waits for nobody, has come least far within the step, and
    came there first (clocks of machines differ a little, so that comes last).
    """
    return min(beats, key=lambda beat: (beat.step, beat.waits != "", beat.moves, beat.since, beat.rank))


def describe_ranks(ranks: Collection[int]) -> str:
    """``rank 3``, ``ranks 3, 4, 5``."""
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, sorted(ranks)))
