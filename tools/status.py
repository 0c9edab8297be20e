"""Where a run stands, from the files of its folder: its step, what is left, its attempts, its last events and errors.

    python tools/status.py runs/pretrain
    python tools/status.py runs/pretrain --watch 10      # again every 10 seconds until the run is done

state     done      RUN/DONE exists
          running   heartbeats are fresh; a rank whose heartbeat is not, or that the others wait for, is named
          starting  an attempt has begun and no rank has a heartbeat yet
          stopped   the last attempt saved a checkpoint and ended because it was told to
          failed    the last attempt ended with an error
          silent    the last attempt ended without a word: killed, or its machines are gone
left      the steps to come times the median duration of the last steps

It only reads, needs no GPU and no torch, and works on every machine that sees the folder (the clocks should agree).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any, Literal

import yaml

from aki_megatron.checkpoint import files
from aki_megatron.errors import DataError, UserError
from aki_megatron.supervise.attempts import Attempt, read_attempts
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.heartbeat import Heartbeat, describe_ranks, lagging
from aki_megatron.supervise.run_paths import RunPaths

FRESH_SECONDS = 30.0
"""A rank that lives writes a heartbeat three times as often."""

LAG_STEPS, LAG_SECONDS = 5.0, 30.0
"""A rank is said to lag once it has been in one place for so many durations of a step, and for so long."""

RECENT_STEPS, SHOWN = 50, 5
"""Steps over which figures are averaged; attempts, events and checkpoints shown."""

TAIL_BYTES = 2**16

State = Literal["done", "running", "starting", "stopped", "failed", "silent", "not started"]


@dataclass(frozen=True)
class Standing:
    """What the folder of a run says about it."""

    folder: RunPaths
    now: float
    steps: int
    metrics: Sequence[Mapping[str, Any]]
    """Lines of the last steps."""
    beats: Sequence[Heartbeat]
    attempts: Sequence[Attempt]
    failure: Mapping[str, Any]
    """first_failure.json; empty without one."""

    @property
    def fresh(self) -> list[Heartbeat]:
        """Heartbeats of ranks that live."""
        return [beat for beat in self.beats if self.now - beat.time < FRESH_SECONDS]

    @property
    def began(self) -> float:
        """When the last attempt began; 0 where none is known."""
        return self.attempts[-1].began if self.attempts else 0.0

    @property
    def step(self) -> int:
        """The last step in the metrics."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def step_seconds(self) -> float:
        """Duration of a step; 0 where nothing tells."""
        measured = [beat.step_seconds for beat in self.fresh if beat.step_seconds]
        return median(measured or [line["seconds"] for line in self.metrics] or [0.0])


def stands(path: Path, now: float) -> Standing:
    """Read the folder. Raises DataError where it is not that of a run."""
    folder = RunPaths(path)
    if not folder.config.exists() and not folder.attempts.exists():
        raise DataError(f"{path} is no run folder: it has neither {folder.config.name} nor {folder.attempts.name}.")
    beats = [Heartbeat.read(file) for file in sorted(folder.heartbeats.glob("rank_*.json"))]
    return Standing(
        folder=folder,
        now=now,
        steps=_steps(folder.config),
        metrics=read_tail(folder.metrics)[-RECENT_STEPS:],
        beats=[beat for beat in beats if beat is not None],
        attempts=read_attempts(folder),
        failure=_failure(folder.first_failure),
    )


def _steps(config: Path) -> int:
    # read as plain YAML: a run of another version can be looked at too
    return int(yaml.safe_load(config.read_text())["train"]["steps"]) if config.exists() else 0


def _failure(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}


def read_tail(path: Path) -> list[dict[str, Any]]:
    """The whole lines at the end of a file of JSON lines that may be long."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    # the first may have lost its beginning, the last is empty or just being written
    return [json.loads(line) for line in lines[1 if size > TAIL_BYTES else 0 : -1] if line]


def state_of(run: Standing) -> tuple[State, str]:
    """One word, and what there is to say about it."""
    if run.folder.done.exists():
        return "done", ""
    last = run.attempts[-1] if run.attempts else None
    if last is not None and last.end is not None:
        state: State = "stopped" if last.end == "stopped" else "failed"
        return state, f"{_ago(run.now - (last.ended or 0))}: {_first_line(last.reason)}"
    if run.failure.get("time", 0.0) > run.began:
        return "failed", f"{_ago(run.now - run.failure['time'])}: see error"
    if run.fresh:
        return "running", f"{len(run.fresh)} of {len(run.beats)} ranks live"
    heard = max((beat.time for beat in run.beats), default=0.0)
    if last is not None and last.began > heard:
        return "starting", f"attempt {last.name} began {_ago(run.now - last.began)}"
    if not heard:
        return "not started", ""
    return "silent", f"last heard of {_ago(run.now - heard)}: killed, or its machines are gone"


def lines(run: Standing) -> Iterator[tuple[str, str]]:
    """What is shown: names and texts."""
    state, text = state_of(run)
    yield "run", str(run.folder.path)
    yield "state", f"{state} ({text})" if text else state
    yield from _rank_lines(run, state)
    if run.folder.stop.exists():
        yield "", f"{run.folder.stop} exists: it is not started again"
    if run.steps:
        yield "step", f"{run.step:,} of {run.steps:,} ({run.step / run.steps:.1%})"
    yield from _figures(run, state)
    saved = files.checkpoints(run.folder.checkpoints)
    yield "saved", ", ".join(path.name for path in saved[-SHOWN:]) or "no checkpoint yet"
    restarts = max(0, len(run.attempts) - 1)
    yield "attempts", f"{len(run.attempts)}, so {restarts} restart{'' if restarts == 1 else 's'}"
    for attempt in run.attempts[-SHOWN:]:
        silent = attempt.end is None and (attempt is not run.attempts[-1] or state == "silent")
        yield "", _attempt_line(attempt, run.now) + ("; ended without a word" if silent else "")
    for event in read_events(run.folder)[-SHOWN:]:
        yield "event", f"{_ago(run.now - event['time'])}, step {event['step']:,}, {event['kind']}: {event['text']}"
    if run.failure:
        yield "error", f"{_ago(run.now - run.failure['time'])}, rank {run.failure['rank']}: {run.failure['text']}"


def _rank_lines(run: Standing, state: State) -> Iterator[tuple[str, str]]:
    """Ranks that do not do what the others do."""
    if state != "running":
        return
    if silent := [beat for beat in run.beats if beat not in run.fresh]:
        oldest = min(silent, key=lambda beat: beat.time)
        ranks = describe_ranks([beat.rank for beat in silent])
        yield "silent", f"{ranks}; rank {oldest.rank} on {oldest.host} was last heard of {_ago(run.now - oldest.time)}"
    last = lagging(run.fresh)
    stays = run.now - last.since
    if stays > max(LAG_SECONDS, LAG_STEPS * run.step_seconds):
        yield "lags", f"rank {last.rank} on {last.host}: in {last.place!r} for {_long(stays)} after step {last.step}"


def _figures(run: Standing, state: State) -> Iterator[tuple[str, str]]:
    if state != "done" and run.steps and run.step_seconds:
        left = (run.steps - run.step) * run.step_seconds
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.now + left))
        yield "left", f"{_long(left)} at {run.step_seconds:.2f} s a step" + (f", {when}" if state == "running" else "")
    if not run.metrics:
        return
    last = run.metrics[-1]
    mean = sum(line["tokens_per_second"] for line in run.metrics) / len(run.metrics)
    skipped = sum(line["skipped"] for line in run.metrics)
    text = f"loss {_figure(last['loss'])}  norm {_figure(last['grad_norm'])}  lr {last['lr']:.2e}"
    text += f"  {mean:,.0f} tokens/s"
    yield "figures", text + (f"  skipped {skipped} of the last {len(run.metrics)} steps" if skipped else "")


def _attempt_line(attempt: Attempt, now: float) -> str:
    size = f" on {attempt.world_size} ranks of {len(attempt.hosts)} machines" if attempt.world_size else ""
    line = f"{attempt.name}: {_ago(now - attempt.began)}, from step {attempt.from_step:,}{size}"
    if attempt.end is not None:
        step = "" if attempt.step is None else f" after step {attempt.step:,}"
        line += f"; {attempt.end}{step}" + (f": {_first_line(attempt.reason)}" if attempt.reason else "")
    return line


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _figure(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _long(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _ago(seconds: float) -> str:
    return f"{_long(max(0.0, seconds))} ago"


def show(path: Path) -> bool:
    """Print where a run stands; whether it is done."""
    run = stands(path, time.time())
    for name, text in lines(run):
        print(f"{name:10}" + text.replace("\n", f"\n{'':10}"))
    sys.stdout.flush()
    return run.folder.done.exists()


def main(argv: Sequence[str] | None = None) -> int:
    """Show, once or again and again; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder (run.dir)")
    parser.add_argument("--watch", type=float, metavar="S", help="show again every S seconds until the run is done")
    arguments = parser.parse_args(argv)
    try:
        while not show(arguments.run) and arguments.watch is not None:
            time.sleep(arguments.watch)
            print("\x1b[H\x1b[2J" if sys.stdout.isatty() else "")  # clear the screen
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass  # how --watch is left
    return 0


if __name__ == "__main__":
    sys.exit(main())
