"""first_failure.json: which rank ended an attempt, and why. No torch here: tools read it."""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from aki_megatron.supervise.json_record import read_record
from aki_megatron.supervise.run_paths import RunPaths


@dataclass(frozen=True)
class FirstFailure:
    """The cause of the end of an attempt."""

    rank: int
    text: str
    code: int
    """Exit code of the whole run."""
    reported_by: int
    """Rank that wrote the file and printed the error."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch."""

    def write_once(self, path: Path) -> None:
        """Create the file, complete from the start. Raises FileExistsError where another rank was first."""
        temporary = path.with_suffix(f".{self.reported_by}")
        try:
            temporary.write_text(json.dumps(asdict(self)) + "\n")
            os.link(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_first_failure(path: Path) -> FirstFailure | None:
    """Read the file; None where it is missing or damaged."""
    return read_record(FirstFailure, path)


def last_first_failure(paths: RunPaths) -> FirstFailure | None:
    """Return the cause of the end of the last start; None where it did not fail, or left no cause."""
    found = [read_first_failure(start.first_failure) for start in paths.starts()]
    return max((failure for failure in found if failure is not None), key=lambda failure: failure.time, default=None)
