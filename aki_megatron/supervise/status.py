"""Status of a run from the files of its folder: step, time left, attempts, recent events and errors.

Only reads; needs no torch.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, Literal

import yaml

from aki_megatron.checkpoint import files
from aki_megatron.errors import DataError
from aki_megatron.supervise.attempts import Attempt, read_attempts
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.first_failure import FirstFailure, last_first_failure
from aki_megatron.supervise.heartbeat import Heartbeat, format_ranks, straggler
from aki_megatron.supervise.jsonl import parse_line, read_intact_lines
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.validations import is_validation

FRESH_SECONDS = 30.0
"""Age below which a heartbeat shows a live rank, which writes one three times as often."""

STRAGGLER_STEPS, STRAGGLER_SECONDS = 5.0, 30.0
"""A rank is shown as the straggler once it has been in one phase for this many step durations, and for so long."""

RECENT_STEPS, MAX_SHOWN = 50, 5
"""Steps over which metrics are averaged; attempts, events and checkpoints shown."""

TAIL_BYTES = 2**16

State = Literal["done", "running", "starting", "stopped", "failed", "unresponsive", "not started"]


@dataclass(frozen=True)
class RunStatus:
    """What the files of a run folder say at time ``now`` (seconds since the epoch)."""

    paths: RunPaths
    now: float
    steps: int
    """Steps of the whole run."""
    metrics: Sequence[Mapping[str, Any]]
    """Lines of the last steps."""
    validations: Sequence[Mapping[str, Any]]
    """Lines of all validations."""
    heartbeats: Sequence[Heartbeat]
    attempts: Sequence[Attempt]
    failure: FirstFailure | None

    @property
    def fresh(self) -> list[Heartbeat]:
        """Heartbeats of live ranks."""
        return [heartbeat for heartbeat in self.heartbeats if self.now - heartbeat.time < FRESH_SECONDS]

    @property
    def began(self) -> float:
        """Start of the last attempt; 0 where none is known."""
        return self.attempts[-1].began if self.attempts else 0.0

    @property
    def step(self) -> int:
        """The last step in the metrics."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def step_seconds(self) -> float:
        """Median duration of a step; 0 where unknown."""
        measured = [heartbeat.step_seconds for heartbeat in self.fresh if heartbeat.step_seconds]
        return median(measured or [line["seconds"] for line in self.metrics] or [0.0])


def read_status(path: Path, now: float) -> RunStatus:
    """Read a run folder; damaged lines and files in it are left out.

    Raises DataError where ``path`` is not one, or its config.yaml cannot be read.
    """
    paths = RunPaths(path)
    if not paths.config.exists() and not paths.attempts.exists():
        raise DataError(f"{path} is not a run folder: it has neither {paths.config.name} nor {paths.attempts.name}.")
    heartbeats = [Heartbeat.read(file) for file in sorted(paths.heartbeats.glob("rank_*.json"))]
    return RunStatus(
        paths=paths,
        now=now,
        steps=_total_steps(paths.config),
        metrics=read_tail(paths.metrics)[-RECENT_STEPS:],
        validations=read_intact_lines(paths.validation, is_validation),
        heartbeats=[heartbeat for heartbeat in heartbeats if heartbeat is not None],
        attempts=read_attempts(paths),
        failure=last_first_failure(paths),
    )


def _total_steps(config: Path) -> int:
    if not config.exists():
        return 0
    try:
        # read as plain YAML: runs of other versions can be shown too
        return int(yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["steps"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise DataError(
            f"{config} is damaged ({type(error).__name__}: {text}); every checkpoint of the run holds a copy."
        ) from error


def _is_metrics_line(line: Mapping[str, Any]) -> bool:
    numbers = [line[name] for name in ("step", "seconds", "tokens_per_second", "skipped", "lr")]
    numbers += [line[name] or 0.0 for name in ("loss", "grad_norm")]
    return all(isinstance(number, int | float) for number in numbers)


def read_tail(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of metrics within the last TAIL_BYTES of a file; damaged ones are left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    # the first may have lost its beginning, the last is empty or being written
    found = []
    for line in lines[1 if size > TAIL_BYTES else 0 : -1]:
        with suppress(DataError):
            found.append(parse_line(path, 0, line, _is_metrics_line))
    return found


def state_of(run: RunStatus) -> tuple[State, str]:
    """Return the state of a run and an explanation, which may be empty."""
    if run.paths.done.exists():
        return "done", ""
    last = run.attempts[-1] if run.attempts else None
    if last is not None and last.end is not None:
        state: State = "stopped" if last.end in ("stopped", "interrupted") else "failed"
        return state, f"{_ago(run.now - (last.ended or 0))}: {_first_line(last.reason)}"
    if run.failure is not None and run.failure.time > run.began:
        return "failed", f"{_ago(run.now - run.failure.time)}: see error"
    if run.fresh:
        return "running", f"{len(run.fresh)} of {len(run.heartbeats)} ranks alive"
    last_heartbeat = max((heartbeat.time for heartbeat in run.heartbeats), default=0.0)
    if last is not None and last.began > last_heartbeat:
        return "starting", f"attempt {last.name} began {_ago(run.now - last.began)}"
    if not last_heartbeat:
        return "not started", ""
    return "unresponsive", f"last heartbeat {_ago(run.now - last_heartbeat)}: killed, or its machines are down"


def format_status(run: RunStatus) -> Iterator[tuple[str, str]]:
    """Yield what is shown: a label, empty for a further line of the label before, and a text."""
    state, text = state_of(run)
    yield "run", str(run.paths.path)
    yield "state", f"{state} ({text})" if text else state
    yield from _rank_lines(run, state)
    if run.paths.stop.exists():
        yield "", f"{run.paths.stop} exists: the run is not started again"
    if run.steps:
        yield "step", f"{run.step:,} of {run.steps:,} ({run.step / run.steps:.1%})"
    yield from _metrics_lines(run, state)
    yield from _validation_lines(run)
    saved = files.list_checkpoints(run.paths.checkpoints)
    yield "checkpoints", ", ".join(path.name for path in saved[-MAX_SHOWN:]) or "none yet"
    if (best := files.best_checkpoint(run.paths.checkpoints)) is not None:
        losses = {line["step"]: line["loss"] for line in run.validations}
        known = f" (validation loss {_number(losses[step])})" if (step := files.step_of(best)) in losses else ""
        yield "best", f"{best.name}{known}"
    restarts = max(0, len(run.attempts) - 1)
    yield "attempts", f"{len(run.attempts)} ({restarts} restart{'' if restarts == 1 else 's'})"
    for attempt in run.attempts[-MAX_SHOWN:]:
        killed = attempt.end is None and (attempt is not run.attempts[-1] or state == "unresponsive")
        yield "", _attempt_line(attempt, run.now) + ("; ended without an error message" if killed else "")
    for event in read_events(run.paths)[-MAX_SHOWN:]:
        yield "event", f"{_ago(run.now - event['time'])}, step {event['step']:,}, {event['kind']}: {event['text']}"
    if run.failure is not None:
        yield "error", f"{_ago(run.now - run.failure.time)}, rank {run.failure.rank}: {run.failure.text}"


def _rank_lines(run: RunStatus, state: State) -> Iterator[tuple[str, str]]:
    """Name the ranks that do not make the progress of the others."""
    if state != "running":
        return
    if silent := [heartbeat for heartbeat in run.heartbeats if heartbeat not in run.fresh]:
        oldest = min(silent, key=lambda heartbeat: heartbeat.time)
        ranks = format_ranks([heartbeat.rank for heartbeat in silent])
        when = f"last heartbeat of rank {oldest.rank} on {oldest.host} {_ago(run.now - oldest.time)}"
        yield "unresponsive", f"{ranks}; {when}"
    last = straggler(run.fresh)
    seconds = run.now - last.since
    if seconds > max(STRAGGLER_SECONDS, STRAGGLER_STEPS * run.step_seconds):
        where = f"in {last.phase!r} for {_duration(seconds)} after step {last.step}"
        yield "straggler", f"rank {last.rank} on {last.host}: {where}"


def _metrics_lines(run: RunStatus, state: State) -> Iterator[tuple[str, str]]:
    if state != "done" and run.steps and run.step_seconds:
        left = (run.steps - run.step) * run.step_seconds
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.now + left))
        text = f"{_duration(left)} at {run.step_seconds:.2f} s per step"
        yield "time left", text + (f", until {when}" if state == "running" else "")
    if not run.metrics:
        return
    last = run.metrics[-1]
    mean = sum(line["tokens_per_second"] for line in run.metrics) / len(run.metrics)
    skipped = sum(line["skipped"] for line in run.metrics)
    text = f"loss {_number(last['loss'])}  norm {_number(last['grad_norm'])}  lr {last['lr']:.2e}"
    text += f"  {mean:,.0f} tokens/s"
    yield "metrics", text + (f"  skipped {skipped} of the last {len(run.metrics)} steps" if skipped else "")


def _validation_lines(run: RunStatus) -> Iterator[tuple[str, str]]:
    """Show the last validation."""
    if not run.validations:
        return
    last = run.validations[-1]
    sources = ", ".join(f"{name} {_number(source['loss'])}" for name, source in last["sources"].items())
    accuracy = "" if last["accuracy"] is None else f"  accuracy {last['accuracy']:.1f} %"
    yield "validation", f"step {last['step']:,}: loss {_number(last['loss'])} ({sources}){accuracy}"


def _attempt_line(attempt: Attempt, now: float) -> str:
    size = f" on {attempt.world_size} ranks of {len(attempt.hosts)} machines" if attempt.world_size else ""
    line = f"{attempt.name}: {_ago(now - attempt.began)}, from step {attempt.from_step:,}{size}"
    if attempt.end is not None:
        step = "" if attempt.step is None else f" after step {attempt.step:,}"
        line += f"; {attempt.end}{step}" + (f": {_first_line(attempt.reason)}" if attempt.reason else "")
    return line


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _ago(seconds: float) -> str:
    return f"{_duration(max(0.0, seconds))} ago"
