"""Compare two runs from the files of their folders: samples, metrics, configuration."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from aki_megatron.config.changes import MAY_CHANGE
from aki_megatron.config.field_info import format_value
from aki_megatron.config.nested import flatten
from aki_megatron.errors import DataError
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.sample_audit import StepSamples, read_sample_audit

PARTS = ("samples", "metrics", "config")
METRICS = ("loss", "grad_norm")

_ABSENT = object()


@dataclass(frozen=True)
class Comparison:
    """The result of one comparison: a sentence and, for programs, its values."""

    part: str
    equal: bool
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)


def compare_runs(a: Path, b: Path, parts: Sequence[str], tolerance: float) -> list[Comparison]:
    """Compare the ``parts`` (of PARTS) of two run folders. Raises DataError where a file is missing."""
    for run in (a, b):
        if not run.is_dir():
            raise DataError(f"{run} is not a folder; give two run folders (run.dir of their configurations).")
    comparisons: list[Comparison] = []
    if "samples" in parts:
        comparisons.append(compare_samples(a, b))
    if "metrics" in parts:
        comparisons += compare_metrics(a, b, tolerance)
    if "config" in parts:
        comparisons += compare_configs(a, b)
    return comparisons


def compare_samples(a: Path, b: Path) -> Comparison:
    """Compare the sample audit logs. Raises DataError where one is missing or lacks steps, or is of another version."""
    first, second = (read_sample_audit(run, unfinished=True) for run in (a, b))
    both = sorted(first.keys() & second.keys())
    if not both:
        raise DataError(f"The sample audit logs of {a} and {b} have no step in common: nothing can be compared.")
    common = [step for step in both if first[step].hash_version == second[step].hash_version]
    diverged = next((step for step in common if first[step] != second[step]), None)
    if diverged is None and len(common) < len(both):
        raise DataError(_other_versions(first, second, both, len(common)))
    ends = (max(first), max(second))
    values = {"first_step": diverged, "common_steps": len(common), "last_steps": ends}
    if diverged is None:
        samples = sum(first[step][0] for step in common)
        text = f"equal in all {len(common):,} steps that both have ({samples:,} samples)"
        return Comparison("samples", ends[0] == ends[1], text + _unequal_ends(*ends), values)
    (count_a, hash_a, _), (count_b, hash_b, _) = first[diverged], second[diverged]
    equal_again = sum(first[step] == second[step] for step in common if step > diverged)
    text = (
        f"they diverge at step {diverged:,}: A trained on {count_a:,} samples (hash {hash_a:016x}), "
        f"B on {count_b:,} (hash {hash_b:016x}). "
        + (f"Steps {common[0]:,} to {diverged - 1:,} are equal. " if diverged > common[0] else "")
        + f"Of the {common[-1] - diverged:,} steps after it {equal_again:,} are equal{_unequal_ends(*ends)}"
    )
    return Comparison("samples", False, text, values)


def _other_versions(
    first: Mapping[int, StepSamples], second: Mapping[int, StepSamples], both: Sequence[int], num_equal: int
) -> str:
    """Return why samples cannot be compared: hashes of two versions differ even for the same samples."""
    step = next(step for step in both if first[step].hash_version != second[step].hash_version)
    return (
        f"The samples of {len(both) - num_equal:,} steps cannot be compared, from step {step:,} on: the audit log of A "
        f"has hashes of version {first[step].hash_version} there, that of B of version {second[step].hash_version} "
        f"(version 1, of earlier releases, is of the samples' keys only). The {num_equal:,} other steps are equal."
    )


def compare_metrics(a: Path, b: Path, tolerance: float) -> Iterator[Comparison]:
    """Compare loss and gradient norm step by step. Raises DataError where a run has no metrics."""
    first, second = (_metrics_by_step(run) for run in (a, b))
    common = sorted(first.keys() & second.keys())
    if not common:
        raise DataError(f"{a} and {b} have no step in common: their metrics cannot be compared.")
    ends = (max(first), max(second))
    for name in METRICS:
        differences = {step: relative_difference(first[step].get(name), second[step].get(name)) for step in common}
        worst = max(common, key=lambda step: differences[step])
        exceeded = next((step for step in common if differences[step] > tolerance), None)
        if differences[worst] == 0:
            text = f"equal in all {len(common):,} steps that both have"
        else:
            pair = f"A {_number(first[worst].get(name))}, B {_number(second[worst].get(name))}"
            text = f"largest relative difference {differences[worst]:.2g} at step {worst:,} ({pair})"
            text += f"; step {exceeded:,} is the first" if exceeded else "; none is"
            text += f" past {tolerance:g} (of {len(common):,} steps)"
        values = {
            # JSON has no infinity: a step that only one run skipped
            "largest": differences[worst] if math.isfinite(differences[worst]) else None,
            "largest_step": worst,
            "first_step": exceeded,
            "common_steps": len(common),
            "last_steps": ends,
        }
        yield Comparison(name, exceeded is None and ends[0] == ends[1], text + _unequal_ends(*ends), values)


def relative_difference(a: float | None, b: float | None) -> float:
    """Return |a - b| / max(|a|, |b|): 0 for equal values, infinite where only one of them is a number."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def compare_configs(a: Path, b: Path) -> Iterator[Comparison]:
    """Compare the resolved configurations. Raises DataError for one that is missing or no YAML."""
    first, second = (dict(flatten(_config_of(run), open_lists=True)) for run in (a, b))
    keys = [key for key in {**first, **second} if first.get(key, _ABSENT) != second.get(key, _ABSENT)]
    free = [key for key in keys if any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE)]
    bound = [key for key in keys if key not in free]
    values = _values_of(first, second, bound)
    if bound:
        text = f"keys differ that change the result ({len(bound)}):" + _listing(first, second, bound)
    else:
        text = "no key differs that changes the result"
    yield Comparison("config", not bound, text, values)
    if free:
        text = f"keys differ that only say where and how fast ({len(free)}):" + _listing(first, second, free)
        yield Comparison("config", True, text, _values_of(first, second, free))


def _values_of(first: Mapping[str, Any], second: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: [first.get(key), second.get(key)] for key in keys}


def _listing(first: Mapping[str, Any], second: Mapping[str, Any], keys: Sequence[str]) -> str:
    return "".join(f"\n{'':12}{key}: A {_value(first, key)}, B {_value(second, key)}" for key in keys)


def _value(flat: Mapping[str, Any], key: str) -> str:
    return format_value(flat[key]) if key in flat else "(absent)"


def _unequal_ends(a: int, b: int) -> str:
    return "" if a == b else f". {'A' if a < b else 'B'} ends after step {min(a, b):,}, the other after {max(a, b):,}"


def _number(value: float | None) -> str:
    return "skipped" if value is None else f"{value:.7g}"


def _metrics_by_step(run: Path) -> dict[int, dict[str, Any]]:
    path = RunPaths(run).metrics
    lines = read_metrics(path)
    if not lines:
        raise DataError(f"{run} has no metrics ({path}); give a run that completed a step.")
    for line in lines:
        if any(not isinstance(line.get(name), int | float | None) for name in METRICS):
            raise DataError(f"{path} is damaged: {', '.join(METRICS)} of step {line['step']} are no numbers.")
    return {line["step"]: line for line in lines}


def _config_of(run: Path) -> dict[str, Any]:
    # read as plain YAML: runs of earlier versions, whose keys may be gone, can be compared too
    path = RunPaths(run).config
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {text}).") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not the configuration of a run.")
    return found
