"""The ledger: what each data rank consumed in each optimizer step, so that two runs can be compared sample by sample.

``<run>/ledger/replica_<data rank>.jsonl`` has a line per step, counted from 1 as in metrics.jsonl:

    {"step": 7, "replicas": 2, "samples": 32, "consumed": "00c5e19f8a04b37d"}

``consumed`` is LoadedStep.consumed, sixteen hexadecimal digits. Over the replicas of a step it adds up, modulo 2^64, to
a number that does not depend on how many replicas there are: equal sums mean equal samples in equal places.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from aki_megatron.data.loader import LoadedStep
from aki_megatron.errors import DataError
from aki_megatron.supervise.run_paths import RunPaths, read_lines, rewind_lines
from aki_megatron.train.loop import Callback
from aki_megatron.types import StepReport

WORD = 2**64
"""Sums of ``consumed`` are taken modulo this."""

_NAMED = 8


class _Line(NamedTuple):
    """What one replica consumed in one step; ``replicas`` is how many the step has."""

    step: int
    replicas: int
    samples: int
    consumed: int


class SampleAuditCallback(Callback):
    """Writes this data rank's file; one rank per replica, one that reads data.

    latest  the step that was trained on last; asked once after every step
    """

    def __init__(self, folder: Path, latest: Callable[[], LoadedStep], *, data_rank: int, data_size: int) -> None:
        assert 0 <= data_rank < data_size, (data_rank, data_size)
        self.folder = folder
        self.latest = latest
        self.data_rank = data_rank
        self.data_size = data_size
        self.file: TextIO | None = None

    def on_start(self, step: int) -> None:
        """Drop lines of steps that are done again, then append.

        The first replica does so too for replicas that an earlier attempt had and this one lacks.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        own = _file(self.folder, self.data_rank)
        rewind_lines(own, step)
        if self.data_rank == 0:
            for number, path in _files(self.folder):
                if number >= self.data_size:
                    rewind_lines(path, step)
        self.file = own.open("a")

    def after_step(self, step: int, report: StepReport) -> None:
        """Append a line and hand it to the operating system, so that a killed process loses none."""
        assert self.file is not None
        loaded = self.latest()
        line = {
            "step": step,
            "replicas": self.data_size,
            "samples": loaded.samples,
            "consumed": f"{loaded.consumed:016x}",
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def on_rollback(self, step: int) -> None:
        """Drop the lines of steps that are done again with other samples."""
        self.on_end(step)
        self.on_start(step)

    def on_end(self, step: int) -> None:
        """Close the file."""
        assert self.file is not None
        self.file.close()


def read_ledger(run: Path, *, unfinished: bool = False) -> dict[int, tuple[int, int]]:
    """Step -> (samples, sum of ``consumed`` modulo 2^64) over all replicas, in the order of the steps.

    Raises DataError where the run has no ledger, and one that names the steps some replica lacks or has twice. With
    ``unfinished`` the last steps may be lacking: replicas that were killed stop at different steps; such steps are
    left out.
    """
    folder = RunPaths(run).ledger
    held: dict[int, list[_Line]] = {}
    for _, path in _files(folder):
        for line in _read(path):
            held.setdefault(line.step, []).append(line)
    if not held:
        raise DataError(f"{run} has no ledger ({folder}/replica_0.jsonl); give the folder of a run that took a step.")
    whole = {step for step, lines in held.items() if all(line.replicas == len(lines) for line in lines)}
    last = max(whole, default=0) if unfinished else max(held)
    if lacking := [step for step in range(1, last + 1) if step not in whole]:
        raise DataError(f"The ledger {folder} lacks lines of some replica, or has some twice: {_described(lacking)}.")
    return {
        step: (sum(line.samples for line in held[step]), sum(line.consumed for line in held[step]) % WORD)
        for step in range(1, last + 1)
    }


def _file(folder: Path, replica: int) -> Path:
    return folder / f"replica_{replica}.jsonl"


def _files(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob("replica_*.jsonl")):
        if found := re.fullmatch(r"replica_(\d+)\.jsonl", path.name):
            yield int(found[1]), path


def _read(path: Path) -> list[_Line]:
    """All lines of a file. Raises DataError for one that is none of ours."""
    try:
        return [
            _Line(line["step"], line["replicas"], line["samples"], int(line["consumed"], 16))
            for line in read_lines(path)
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no ledger, or was damaged: {type(error).__name__} {error}") from error


def _described(steps: Iterable[int]) -> str:
    """``steps 3, 5 to 9``, the first few runs of numbers."""
    runs: list[tuple[int, int]] = []
    for step in steps:
        if runs and runs[-1][1] == step - 1:
            runs[-1] = (runs[-1][0], step)
        else:
            runs.append((step, step))
    words = [str(first) if first == last else f"{first} to {last}" for first, last in runs]
    rest = [f"and {len(words) - _NAMED} more ranges"] if len(words) > _NAMED else []
    return "steps " + ", ".join(words[:_NAMED] + rest)
