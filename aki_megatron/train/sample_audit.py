"""The sample audit log: which samples each data rank trained on in each step, so that two runs can be compared exactly.

``<run>/sample_audit/replica_<data rank>.jsonl`` has a line per step, counted from 1 as in metrics.jsonl:

    {"step": 7, "replicas": 2, "samples": 32, "hash_version": 2, "samples_hash": "00c5e19f8a04b37d"}

``samples_hash`` is LoadedStep.samples_hash in hexadecimal, ``hash_version`` that of data/sample_hash.py; a line without
it is of version 1. The sum over the replicas of a step, modulo 2^64, does not depend on their number: equal sums mean
that the same tokens, targets and pixels were trained in the same positions. Sums of two versions cannot be compared.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.loader import LoadedStep
from aki_megatron.data.sample_hash import HASH_VERSION
from aki_megatron.errors import DataError
from aki_megatron.supervise.jsonl import discard_steps_after, read_lines
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.step_log import StepLog
from aki_megatron.train.loop import Callback
from aki_megatron.types import StepReport

MODULUS = 2**64
"""Of sums of ``samples_hash``."""

_MAX_RANGES = 8
"""Ranges of steps that an error names."""


class _Line(NamedTuple):
    """What one replica trained on in one step; ``replicas``: how many the step has."""

    step: int
    replicas: int
    samples: int
    samples_hash: int
    hash_version: int


class StepSamples(NamedTuple):
    """What all replicas together trained on in one step: samples, and the sum of ``samples_hash`` modulo 2^64."""

    samples: int
    samples_hash: int
    hash_version: int


class SampleAuditCallback(Callback):
    """Write the file of this data rank; on one rank per replica, one that reads data.

    last_loaded  returns the step that was trained on last; called once after every step
    open_log     returns what writes the file
    """

    required = True

    def __init__(
        self,
        folder: Path,
        last_loaded: Callable[[], LoadedStep],
        *,
        data_rank: int,
        data_size: int,
        open_log: Callable[[Path], StepLog] = StepLog,
    ) -> None:
        assert 0 <= data_rank < data_size, (data_rank, data_size)
        self.folder = folder
        self.last_loaded = last_loaded
        self.data_rank = data_rank
        self.data_size = data_size
        self.log = open_log(_path(folder, data_rank))

    def on_start(self, step: int) -> None:
        self.log.start(step)
        if self.data_rank == 0:
            # an earlier attempt may have had more replicas
            for replica, path in _paths(self.folder):
                if replica >= self.data_size:
                    discard_steps_after(path, step)

    def on_step(self, step: int, report: StepReport) -> None:
        loaded = self.last_loaded()
        line = {
            "step": step,
            "replicas": self.data_size,
            "samples": loaded.num_samples,
            "hash_version": HASH_VERSION,
            "samples_hash": f"{loaded.samples_hash:016x}",
        }
        self.log.write(line)

    def on_rollback(self, step: int) -> None:
        self.on_start(step)

    def on_stop(self, step: int) -> None:
        self.log.close(in_checkpoint=True)

    def on_end(self, step: int) -> None:
        self.log.close()


def read_sample_audit(run: Path, *, unfinished: bool = False) -> dict[int, StepSamples]:
    """Return step -> what all replicas trained on, in the order of the steps.

    With ``unfinished`` the last steps may be incomplete, as replicas that were killed stop at different steps; such
    steps are left out. Raises DataError where the run has no audit log, and where a replica lacks a step or has it
    twice; the error names the steps.
    """
    folder = RunPaths(run).sample_audit
    by_step: dict[int, list[_Line]] = {}
    for _, path in _paths(folder):
        for line in _read(path):
            by_step.setdefault(line.step, []).append(line)
    if not by_step:
        raise DataError(
            f"{run} has no sample audit log ({folder}/replica_0.jsonl); give the folder of a run that completed a step."
        )
    complete = {
        step
        for step, lines in by_step.items()
        if all((line.replicas, line.hash_version) == (len(lines), lines[0].hash_version) for line in lines)
    }
    last = max(complete, default=0) if unfinished else max(by_step)
    if missing := [step for step in range(1, last + 1) if step not in complete]:
        raise DataError(
            f"The sample audit log {folder} lacks lines of some replica, or has some twice: {_format_steps(missing)}."
        )
    return {step: _sum(by_step[step]) for step in range(1, last + 1)}


def _sum(lines: Sequence[_Line]) -> StepSamples:
    """Return the sum of the lines of one step."""
    samples_hash = sum(line.samples_hash for line in lines) % MODULUS
    return StepSamples(sum(line.samples for line in lines), samples_hash, lines[0].hash_version)


def _path(folder: Path, replica: int) -> Path:
    return folder / f"replica_{replica}.jsonl"


def _paths(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob("replica_*.jsonl")):
        if match := re.fullmatch(r"replica_(\d+)\.jsonl", path.name):
            yield int(match[1]), path


def _read(path: Path) -> list[_Line]:
    """Return the lines of a file. Raises DataError that names a line of another form."""
    return [_parse(line) for line in read_lines(path, _parse)]


def _parse(line: Mapping[str, Any]) -> _Line:
    """Return a line. Raises ValueError, KeyError or TypeError for one of another form."""
    numbers = [line["step"], line["replicas"], line["samples"], line.get("hash_version", 1)]
    if any(type(number) is not int for number in numbers):
        raise ValueError(numbers)
    step, replicas, samples, hash_version = numbers
    return _Line(step, replicas, samples, int(line["samples_hash"], 16), hash_version)


def _format_steps(steps: Iterable[int]) -> str:
    """Return ``steps 3, 5 to 9``: the first few ranges of consecutive numbers."""
    ranges: list[tuple[int, int]] = []
    for step in steps:
        if ranges and ranges[-1][1] == step - 1:
            ranges[-1] = (ranges[-1][0], step)
        else:
            ranges.append((step, step))
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in ranges]
    rest = [f"and {len(texts) - _MAX_RANGES} more ranges"] if len(texts) > _MAX_RANGES else []
    return "steps " + ", ".join(texts[:_MAX_RANGES] + rest)
