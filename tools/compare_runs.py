"""Where two runs part: the samples they consumed, their metrics, their configurations.

    python tools/compare_runs.py runs/a runs/b
    python tools/compare_runs.py runs/whole runs/killed_and_resumed && echo equal
    python tools/compare_runs.py runs/a runs/b --only samples       # the proof that a resume was exact
    python tools/compare_runs.py runs/a runs/b --json > parting.json

samples   The ledgers of both runs (<run>/ledger/): for every optimizer step a sum over the keys of the consumed samples
          and their places, which does not depend on the number of GPUs. Equal sums mean the same samples in the same
          rows. The first step that differs is where the runs part.
metrics   metrics.jsonl: the largest relative difference of loss and grad_norm, |a - b| / max(|a|, |b|), and the
          first step past --tolerance. Runs of one configuration on the same number of GPUs agree exactly; on another
          number to about 1e-5 in fp32, since sums are taken in another order. A skipped step has no loss.
config    config.yaml: the keys that differ. Those that say where and how fast a run goes (run.dir, parallel, workers)
          are shown, but do not make two runs different.

A run that was killed or still goes on can be compared too: the steps that both have count, and that one ends earlier
is a difference. Exit code: 0 equal, 1 different, 2 nothing could be compared (a mistake in the command).
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from aki_megatron.config.field_info import shown
from aki_megatron.config.save import MAY_CHANGE
from aki_megatron.errors import DataError, UserError
from aki_megatron.supervise.run_paths import RunPaths, read_metrics
from aki_megatron.train.sample_audit import read_ledger

PARTS = ("samples", "metrics", "config")
METRICS = ("loss", "grad_norm")
EQUAL, DIFFERENT, MISTAKE = 0, 1, 2

_ABSENT = object()


@dataclass(frozen=True)
class Finding:
    """One comparison: a sentence and, for programs, its figures."""

    part: str
    equal: bool
    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def compare_samples(a: Path, b: Path) -> Finding:
    """The ledgers. Raises DataError where one is missing or lacks steps."""
    first, second = (read_ledger(run, unfinished=True) for run in (a, b))
    common = sorted(first.keys() & second.keys())
    if not common:
        raise DataError(f"The ledgers of {a} and {b} have no step in common: nothing can be compared.")
    parted = next((step for step in common if first[step] != second[step]), None)
    ends = (max(first), max(second))
    figures = {"first_step": parted, "common_steps": len(common), "last_steps": ends}
    if parted is None:
        samples = sum(first[step][0] for step in common)
        text = f"the same in all {len(common):,} steps that both have ({samples:,} samples)"
        return Finding("samples", ends[0] == ends[1], text + _unequal_ends(*ends), figures)
    (count_a, sum_a), (count_b, sum_b) = first[parted], second[parted]
    again = sum(first[step] == second[step] for step in common if step > parted)
    text = (
        f"they part at step {parted:,}: A consumed {count_a:,} samples (sum {sum_a:016x}), "
        f"B {count_b:,} (sum {sum_b:016x}). "
        + (f"Steps 1 to {parted - 1:,} are the same. " if parted > 1 else "")
        + f"Of the {common[-1] - parted:,} steps after it {again:,} are the same{_unequal_ends(*ends)}"
    )
    return Finding("samples", False, text, figures)


def compare_metrics(a: Path, b: Path, tolerance: float) -> Iterator[Finding]:
    """Loss and norm, step by step. Raises DataError where a run has no metrics."""
    first, second = (_metrics_of(run) for run in (a, b))
    common = sorted(first.keys() & second.keys())
    if not common:
        raise DataError(f"{a} and {b} have no step in common: nothing of their metrics can be compared.")
    ends = (max(first), max(second))
    for name in METRICS:
        differences = {step: relative(first[step].get(name), second[step].get(name)) for step in common}
        worst = max(common, key=lambda step: differences[step])
        past = next((step for step in common if differences[step] > tolerance), None)
        values = f"A {_number(first[worst].get(name))}, B {_number(second[worst].get(name))}"
        if differences[worst] == 0:
            text = f"equal in all {len(common):,} steps that both have"
        else:
            text = f"largest relative difference {differences[worst]:.2g} at step {worst:,} ({values})"
            text += f"; step {past:,} is the first" if past else "; none is"
            text += f" past {tolerance:g} (of {len(common):,} steps)"
        figures = {
            # JSON has no infinity: a step that only one run skipped
            "largest": differences[worst] if math.isfinite(differences[worst]) else None,
            "largest_step": worst,
            "first_step": past,
            "common_steps": len(common),
            "last_steps": ends,
        }
        yield Finding(name, past is None and ends[0] == ends[1], text + _unequal_ends(*ends), figures)


def relative(a: float | None, b: float | None) -> float:
    """|a - b| / max(|a|, |b|): 0 for equal values, infinite where only one of them is a number."""
    if a is None or b is None:
        return 0.0 if a is b else math.inf
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0


def compare_configs(a: Path, b: Path) -> Iterator[Finding]:
    """The resolved configurations. Raises DataError for one that is missing or no YAML."""
    first, second = (dict(_leaves(_config_of(run))) for run in (a, b))
    keys = [key for key in {**first, **second} if first.get(key, _ABSENT) != second.get(key, _ABSENT)]
    free = [key for key in keys if any(f"{key}.".startswith(f"{name}.") for name in MAY_CHANGE)]
    bound = [key for key in keys if key not in free]
    yield _differing(
        first, second, bound, "no key differs that decides what is learnt", "keys differ that decide what is learnt"
    )
    if free:
        yield _differing(first, second, free, "", "keys differ that only say where and how fast")


def _differing(first: Mapping[str, Any], second: Mapping[str, Any], keys: list[str], none: str, some: str) -> Finding:
    lines = [f"{key}: A {_value(first, key)}, B {_value(second, key)}" for key in keys]
    text = f"{some} ({len(keys)}):\n" + "\n".join(f"{'':12}{line}" for line in lines) if keys else none
    return Finding("config", not keys or not none, text, {key: [first.get(key), second.get(key)] for key in keys})


def compare(a: Path, b: Path, parts: Sequence[str], tolerance: float) -> list[Finding]:
    """All that was asked for. Raises UserError where something is missing."""
    for run in (a, b):
        if not run.is_dir():
            raise DataError(f"{run} is not a folder; give two run folders (run.dir of their configurations).")
    findings: list[Finding] = []
    if "samples" in parts:
        findings.append(compare_samples(a, b))
    if "metrics" in parts:
        findings += compare_metrics(a, b, tolerance)
    if "config" in parts:
        findings += compare_configs(a, b)
    return findings


def show(a: Path, b: Path, findings: Sequence[Finding], console: Console) -> None:
    """One paragraph per comparison, and the verdict."""
    console.print(f"A {a}\nB {b}", markup=False)
    for finding in findings:
        style = "green" if finding.equal else "red"
        console.print(f"{finding.part:10}", style=style, end="")
        console.print(finding.text, markup=False, soft_wrap=True)
    different = [finding.part for finding in findings if not finding.equal]
    verdict = f"different: {', '.join(different)}" if different else "equal"
    console.print(f"{'verdict':10}{verdict}", style="bold red" if different else "bold green")


def _unequal_ends(a: int, b: int) -> str:
    return "" if a == b else f". {'A' if a < b else 'B'} ends after step {min(a, b):,}, the other after {max(a, b):,}"


def _metrics_of(run: Path) -> dict[int, dict[str, Any]]:
    path = RunPaths(run).metrics
    lines = read_metrics(path)
    if not lines:
        raise DataError(f"{run} has no metrics ({path}); give a run that took a step.")
    return {line["step"]: line for line in lines}


def _config_of(run: Path) -> dict[str, Any]:
    # Read as plain YAML: runs of earlier versions, whose keys may be gone, can be compared too.
    path = RunPaths(run).config
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is no configuration of a run.")
    return found


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(item, dict) for item in value):
            value = {str(number): item for number, item in enumerate(value)}
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _value(leaves: Mapping[str, Any], key: str) -> str:
    return shown(leaves[key]) if key in leaves else "(not there)"


def _number(value: float | None) -> str:
    return "skipped" if value is None else f"{value:.7g}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="a run folder")
    parser.add_argument("b", type=Path, metavar="B", help="the other one")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART",
                        help=f"compare only these, of {', '.join(PARTS)}; default: all")  # fmt: skip
    parser.add_argument("--tolerance", type=float, default=1e-4,
                        help="relative difference of a metric that is still equal; default: %(default)s")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print an object instead of text")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and say so; the exit code."""
    arguments = parse(argv)
    try:
        findings = compare(arguments.a, arguments.b, arguments.only, arguments.tolerance)
    except UserError as error:
        print(
            f"error: {error}\n--only compares what both runs have, for example --only metrics config.", file=sys.stderr
        )
        return MISTAKE
    equal = all(finding.equal for finding in findings)
    if arguments.json:
        runs = {"a": str(arguments.a), "b": str(arguments.b), "equal": equal}
        print(json.dumps(runs | {"findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        show(arguments.a, arguments.b, findings, Console(highlight=False))
    return EQUAL if equal else DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
