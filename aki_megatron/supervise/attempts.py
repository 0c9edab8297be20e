"""Attempts: how often a run was started, where each attempt began, how it ended, and whether to start another.

attempts.jsonl has a line when an attempt starts and one when it ends:

    {"attempt": "4711.0", "time": 1735689600.0, "from_step": 1200, "world_size": 64, "hosts": ["gpu03", "gpu04"]}
    {"attempt": "4711.0", "time": 1735693200.0, "step": 1730, "end": "stopped", "reason": "the time limit is near"}

A batch script writes a first line of the kind without world_size and hosts before it starts any rank, so that attempts
which die before they can write anything are counted too. An attempt that was killed has no last line. No torch here:
batch scripts ask (tools/attempt.py).
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from aki_megatron.checkpoint import files
from aki_megatron.supervise.run_paths import RunPaths, append_line, read_lines

End = Literal["done", "stopped", "failed", "given up"]
"""``given up``: written when no further attempt is worth it. Attempts that a person starts after that count anew."""

Answer = Literal["done", "stopped", "retry", "give up", "stop-file"]

LONGEST_REASON = 300
"""Characters of the last error that a verdict repeats."""


@dataclass(frozen=True)
class Attempt:
    """One attempt, all its lines together. ``ended`` is None while it runs, and for ever when it was killed."""

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
class Verdict:
    """Whether to start a run again."""

    answer: Answer
    reason: str


def newest_step(folder: RunPaths) -> int:
    """Step of the newest complete checkpoint; 0 where there is none."""
    newest = files.newest(folder.checkpoints)
    return 0 if newest is None else files.step_of(newest)


def begin_attempt(
    folder: RunPaths, attempt: str, *, from_step: int, world_size: int = 0, hosts: Sequence[str] = ()
) -> None:
    """Note that an attempt starts; without world_size and hosts where they are not known yet."""
    line: dict[str, Any] = {"attempt": attempt, "time": time.time(), "from_step": from_step}
    if world_size:
        line |= {"world_size": world_size, "hosts": list(hosts)}
    append_line(folder.attempts, line)


def end_attempt(folder: RunPaths, attempt: str, *, step: int | None, end: End, reason: str) -> None:
    """Note how an attempt ended; ``step``: optimizer steps that were done, None where that is not known."""
    line = {"attempt": attempt, "time": time.time(), "step": step, "end": end, "reason": reason}
    append_line(folder.attempts, line)


def read_attempts(folder: RunPaths) -> list[Attempt]:
    """All attempts, oldest first."""
    found: dict[str, dict[str, Any]] = {}
    for line in read_lines(folder.attempts):
        first = {"name": line["attempt"], "began": line["time"], "from_step": line.get("from_step", 0)}
        facts = found.setdefault(line["attempt"], first)
        if "end" in line:
            facts |= {"ended": line["time"], "step": line["step"], "end": line["end"], "reason": line["reason"]}
        elif "world_size" in line:
            facts |= {"world_size": line["world_size"], "hosts": tuple(line["hosts"])}
    return [Attempt(**facts) for facts in found.values()]


def without_progress(attempts: Sequence[Attempt], newest: int) -> int:
    """How many attempts in a row, counted from the last one back, failed and left no newer checkpoint than they had.

    newest  step of the newest complete checkpoint now
    """
    count, after = 0, newest
    for attempt in reversed(attempts):
        if after > attempt.from_step or attempt.end not in (None, "failed"):
            break
        count, after = count + 1, attempt.from_step
    return count


def judge(folder: RunPaths, attempt: str, *, give_up_after: int) -> Verdict:
    """Whether to start a run again after ``attempt`` has ended.

    give_up_after  attempts in a row without a newer checkpoint after which another one is not worth it
    """
    if folder.done.exists():
        return Verdict("done", f"{folder.done} exists")
    if folder.stop.exists():
        return Verdict("stop-file", f"{folder.stop} exists; remove it to let the run go on")
    if folder.stopped(attempt).exists():
        return Verdict("stopped", _why_stopped(folder, attempt))
    attempts, newest = read_attempts(folder), newest_step(folder)
    own = next((known for known in attempts if known.name == attempt), None)
    if own is None:
        own = Attempt(attempt, time.time(), newest)
        attempts.append(own)
    if own.end == "given up":
        return Verdict("give up", own.reason)
    count, error = without_progress(attempts, newest), _last_error(folder, own)
    if count >= give_up_after:
        return Verdict(
            "give up", f"{count} attempts in a row left no newer checkpoint than that of step {newest}; {error}"
        )
    progress = f"{count} of {give_up_after} in a row without a newer one" if count else "newer than the one before"
    return Verdict("retry", f"the attempt failed; the newest checkpoint is of step {newest}, {progress}; {error}")


def _why_stopped(folder: RunPaths, attempt: str) -> str:
    try:
        facts = json.loads(folder.stopped(attempt).read_text())
        return f"after step {facts['step']}: {facts['reason']}"
    except (ValueError, KeyError):  # the file was cut by a full disk; that it exists is what counts
        return f"{folder.stopped(attempt)} exists"


def _last_error(folder: RunPaths, attempt: Attempt) -> str:
    """What ended an attempt, in one line."""
    try:
        cause = json.loads(folder.first_failure.read_text())
        if cause["time"] >= attempt.began:
            return f"last error, on rank {cause['rank']}: {_one_line(cause['text'])}"
    except (FileNotFoundError, ValueError, KeyError):
        pass  # without the file, or with one that a full disk has cut, there is only the log
    return _one_line(attempt.reason) or "no rank left a message (killed? the log of the job may say more)"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST_REASON]
