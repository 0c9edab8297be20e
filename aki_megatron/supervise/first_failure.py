"""first_failure.json: which rank ended an attempt, and why. No torch here: tools read it."""

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path


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
    """Read the file; None where it is missing, or was truncated by a full disk."""
    try:
        content = json.loads(path.read_text())
        return FirstFailure(**{each.name: content[each.name] for each in fields(FirstFailure)})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
