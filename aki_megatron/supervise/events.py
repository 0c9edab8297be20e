"""events.jsonl: what happened to a run besides steps, one object per line, in order.

    {"time": 1735689600.0, "step": 1200, "kind": "loss_spike", "text": "loss 9.1 is 4.6 times the median ..."}

Events are a history: lines stay when a run rolls back and repeats steps. No torch here: tools read it.
"""

import time
from collections.abc import Callable
from typing import Any, Literal, get_args

from aki_megatron.supervise.jsonl import append_line, read_lines
from aki_megatron.supervise.run_paths import RunPaths

EventKind = Literal["loss_spike", "non_finite", "rollback", "hang", "save_failed", "save", "stop", "change"]

EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)

EventRecorder = Callable[[int, EventKind, str], None]
"""Takes the step after which something happened, the kind of event, and a text."""


def record_event(paths: RunPaths, step: int, kind: EventKind, text: str) -> None:
    """Append an event after ``step``. Call it on the one rank that knows of the event."""
    assert kind in EVENT_KINDS, kind
    append_line(paths.events, {"time": time.time(), "step": step, "kind": kind, "text": text})


def ignore_event(_step: int, _kind: EventKind, _text: str) -> None:
    """Do nothing: the EventRecorder of ranks that do not write events."""


def read_events(paths: RunPaths) -> list[dict[str, Any]]:
    """Return all events, oldest first."""
    return read_lines(paths.events)
