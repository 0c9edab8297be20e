"""What happened to a run besides steps: events.jsonl, an object per line, in the order in which things happened.

    {"time": 1735689600.0, "step": 1200, "kind": "spike", "text": "loss 9.1 is 4.6 times the median ..."}

A history: lines stay when a run goes back to a checkpoint and does steps again. No torch here: tools read it.
"""

import time
from typing import Any, Literal, get_args

from aki_megatron.supervise.run_paths import RunPaths, append_line, read_lines

Kind = Literal["spike", "non_finite", "rollback", "hang", "save_failed", "save", "stop"]

KINDS: tuple[Kind, ...] = get_args(Kind)


def record(folder: RunPaths, step: int, kind: Kind, text: str) -> None:
    """Append an event after ``step``; one rank calls this, the one that knows."""
    assert kind in KINDS, kind
    append_line(folder.events, {"time": time.time(), "step": step, "kind": kind, "text": text})


def read_events(folder: RunPaths) -> list[dict[str, Any]]:
    """All events, oldest first."""
    return read_lines(folder.events)
