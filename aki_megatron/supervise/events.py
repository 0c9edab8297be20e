"""events.jsonl: what happened to a run besides steps, one object per line, in order.

    {"time": 1735689600.0, "step": 1200, "kind": "loss_spike", "text": "loss 9.1 is 4.6 times the median ..."}

Events are a history: lines stay when a run rolls back and repeats steps. No torch here: tools read it.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from aki_megatron.supervise.jsonl import append_line, has_step, read_intact_lines
from aki_megatron.supervise.run_paths import RunPaths

EventKind = Literal[
    "loss_spike", "non_finite", "rollback", "hang", "save_failed", "save", "stop", "change", "output_failed"
]

EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)

logger = logging.getLogger("aki_megatron.supervise")

MAX_HELD_EVENTS = 1000
"""Events that wait in memory while they cannot be written; older ones are lost, the log of rank 0 has them."""

EventRecorder = Callable[[int, EventKind, str], None]
"""Takes the step after which something happened, the kind of event, and a text."""


def record_event(paths: RunPaths, step: int, kind: EventKind, text: str) -> None:
    """Append an event after ``step``. Call it on the one rank that knows of the event."""
    assert kind in EVENT_KINDS, kind
    append_line(paths.events, {"time": time.time(), "step": step, "kind": kind, "text": text})


class EventLog:
    """Record the events of one rank; those that cannot be written (full disk) are written with a later one."""

    def __init__(self, paths: RunPaths) -> None:
        self._paths = paths
        self._held: deque[dict[str, Any]] = deque(maxlen=MAX_HELD_EVENTS)

    def record(self, step: int, kind: EventKind, text: str) -> None:
        """Append an event after ``step``; an EventRecorder that never raises OSError."""
        assert kind in EVENT_KINDS, kind
        self._held.append({"time": time.time(), "step": step, "kind": kind, "text": text})
        try:
            while self._held:
                append_line(self._paths.events, self._held[0])
                self._held.popleft()
        except OSError as error:
            logger.error("%s cannot be written (%s): step %d, %s: %s", self._paths.events, error, step, kind, text)


def ignore_event(_step: int, _kind: EventKind, _text: str) -> None:
    """Do nothing: the EventRecorder of ranks that do not write events."""


def read_events(paths: RunPaths) -> list[dict[str, Any]]:
    """Return all events, oldest first; damaged lines are left out."""
    return read_intact_lines(paths.events, _is_event)


def _is_event(line: Mapping[str, Any]) -> bool:
    return isinstance(line["time"], int | float) and has_step(line) and {"kind", "text"} <= line.keys()
