"""Attempts of a run: where each began, how it ended, and whether to start another.

attempts.jsonl has a line when an attempt starts and one when it ends:

    {"attempt": "4711.0", "time": 1735689600.0, "from_step": 1200, "world_size": 64, "hosts": ["gpu03", "gpu04"]}
    {"attempt": "4711.0", "time": 1735693200.0, "step": 1730, "end": "stopped", "reason": "the time limit is near"}

A batch script writes a first line without world_size and hosts before it starts any rank, so that attempts that fail
before they can write anything count too. An attempt that was killed has no last line. No torch here: batch scripts run
this through tools/attempt.py.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from aki_megatron.checkpoint import files
from aki_megatron.errors import DataError
from aki_megatron.supervise.first_failure import last_first_failure
from aki_megatron.supervise.jsonl import append_line, read_intact_lines
from aki_megatron.supervise.run_folder import describe_os_error
from aki_megatron.supervise.run_paths import RunPaths

End = Literal["done", "stopped", "interrupted", "failed", "given up"]
"""``interrupted``: by Ctrl-C, without another checkpoint. ``given up``: no further attempt is worthwhile. Attempts that
a user starts after that count from one again."""

Decision = Literal["begin", "done", "stopped", "retry", "give up", "stop-file"]

MAX_REASON_CHARACTERS = 300
"""Characters of the last error that a decision repeats."""


@dataclass(frozen=True)
class Attempt:
    """One attempt, all its lines together. ``ended`` is None while it runs, and stays so when it was killed."""

    name: str
    began: float
    from_step: int
    world_size: int = 0
    hosts: tuple[str, ...] = ()
    ended: float | None = None
    step: int | None = None
    end: End | None = None
    reason: str = ""


@dataclass(frozen=True)
class RestartDecision:
    """Whether to start a run, and why."""

    decision: Decision
    reason: str


def newest_step(paths: RunPaths) -> int:
    """Return the step of the newest complete checkpoint; 0 without one."""
    newest = files.latest_checkpoint(paths.checkpoints)
    return 0 if newest is None else files.step_of(newest)


def record_start(
    paths: RunPaths, attempt: str, *, from_step: int, world_size: int = 0, hosts: Sequence[str] = ()
) -> None:
    """Record that an attempt starts; without world_size and hosts where they are not known yet."""
    line: dict[str, Any] = {"attempt": attempt, "time": time.time(), "from_step": from_step}
    if world_size:
        line |= {"world_size": world_size, "hosts": list(hosts)}
    append_line(paths.attempts, line)


def record_end(paths: RunPaths, attempt: str, *, step: int | None, end: End, reason: str) -> None:
    """Record how an attempt ended; ``step``: optimizer steps done, None where unknown."""
    line = {"attempt": attempt, "time": time.time(), "step": step, "end": end, "reason": reason}
    append_line(paths.attempts, line)


def read_attempts(paths: RunPaths) -> list[Attempt]:
    """Return all attempts, oldest first; damaged lines are left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in read_intact_lines(paths.attempts, _is_attempt_line):
        start = {"name": line["attempt"], "began": line["time"], "from_step": line.get("from_step", 0)}
        fields = found.setdefault(line["attempt"], start)
        if "end" in line:
            fields |= {"ended": line["time"], "step": line["step"], "end": line["end"], "reason": line["reason"]}
        elif "world_size" in line:
            fields |= {"world_size": line["world_size"], "hosts": tuple(line["hosts"])}
    return [Attempt(**fields) for fields in found.values()]


def _is_attempt_line(line: Mapping[str, Any]) -> bool:
    step, numbers = line.get("step"), [line["time"], line.get("from_step", 0), line.get("world_size", 0)]
    return (
        isinstance(line["attempt"], str)
        and all(isinstance(number, int | float) for number in numbers)
        and isinstance(line.get("hosts", []), list)
        and ("end" not in line or (line["end"] in get_args(End) and isinstance(line["reason"], str)))
        and (step is None or isinstance(step, int))
    )


def count_without_progress(attempts: Sequence[Attempt], newest: int) -> int:
    """Return how many of the last attempts in a row failed and left no newer checkpoint than they started from.

    newest  step of the newest complete checkpoint now
    """
    count, after = 0, newest
    for attempt in reversed(attempts):
        if after > attempt.from_step or attempt.end not in (None, "failed"):
            break
        count, after = count + 1, attempt.from_step
    return count


def begin_attempt(paths: RunPaths, attempt: str) -> RestartDecision:
    """Record the start of an attempt before any rank runs, unless the file STOP forbids it (``stop-file``).

    Raises DataError where the run folder cannot be written to.
    """
    if paths.stop.exists():
        return RestartDecision("stop-file", f"{paths.stop} exists; remove it to continue the run")
    step = newest_step(paths)
    try:
        paths.path.mkdir(parents=True, exist_ok=True)
        record_start(paths, attempt, from_step=step)
    except OSError as error:
        raise DataError(f"The run folder {paths.path} cannot be written to: {describe_os_error(error)}.") from error
    return RestartDecision("begin", f"attempt {attempt} from step {step}")


def decide_restart(paths: RunPaths, attempt: str, *, give_up_after: int) -> RestartDecision:
    """Decide whether to start a run again after ``attempt`` has ended, and record when it is given up.

    give_up_after  attempts in a row without a newer checkpoint after which another one is not worthwhile
    """
    decision = _decide(paths, attempt, give_up_after)
    if decision.decision == "give up":
        record_end(paths, attempt, step=newest_step(paths), end="given up", reason=decision.reason)
    return decision


def _decide(paths: RunPaths, attempt: str, give_up_after: int) -> RestartDecision:
    if paths.done.exists():
        return RestartDecision("done", f"{paths.done} exists")
    if paths.stop.exists():
        return RestartDecision("stop-file", f"{paths.stop} exists; remove it to continue the run")
    if paths.stopped(attempt).exists():
        return RestartDecision("stopped", _stop_reason(paths, attempt))
    attempts, newest = read_attempts(paths), newest_step(paths)
    own = next((known for known in attempts if known.name == attempt), None)
    if own is None:
        own = Attempt(attempt, time.time(), newest)
        attempts.append(own)
    if own.end == "given up":
        return RestartDecision("give up", own.reason)
    if own.end == "interrupted":
        return RestartDecision("stopped", own.reason)
    count, error = count_without_progress(attempts, newest), _last_error(paths, own)
    if count >= give_up_after:
        return RestartDecision(
            "give up", f"{count} attempts in a row left no newer checkpoint than that of step {newest}; {error}"
        )
    progress = f"{count} of {give_up_after} in a row without a newer one" if count else "newer than the one before"
    return RestartDecision(
        "retry", f"the attempt failed; the newest checkpoint is of step {newest}, {progress}; {error}"
    )


def _stop_reason(paths: RunPaths, attempt: str) -> str:
    try:
        fields = json.loads(paths.stopped(attempt).read_text())
        return f"after step {fields['step']}: {fields['reason']}"
    except (OSError, ValueError, KeyError, TypeError):  # truncated by a full disk; that it exists is what counts
        return f"{paths.stopped(attempt)} exists"


def _last_error(paths: RunPaths, attempt: Attempt) -> str:
    """Return what ended an attempt, on one line."""
    cause = last_first_failure(paths)
    if cause is not None and cause.time >= attempt.began:
        return f"last error, on rank {cause.rank}: {_one_line(cause.text)}"
    return _one_line(attempt.reason) or "no rank left an error message (killed? the log of the job may say more)"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MAX_REASON_CHARACTERS]
