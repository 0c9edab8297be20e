"""What works together now, and what does not yet: one table, read by the validator, the documentation and the tests.

A run matches at least one supported row and no refused one; what no row names is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aki_megatron.config.run import RunConfig


@dataclass(frozen=True)
class Combination:
    """One row: supported with the test that proves it, or refused with the reason and the way out."""

    name: str
    matches: Callable[[RunConfig], bool]
    proof: str = ""
    """File of the test that proves a supported row."""
    refusal: str = ""
    """Why a refused row is refused and what to change; ``{run.section.key}`` is filled in."""


def _data_parallel(run: RunConfig) -> bool:
    return run.parallel.tensor == 1 and run.parallel.pipeline == 1


COMBINATIONS: tuple[Combination, ...] = (
    Combination(
        name="ZeRO-1 over data parallelism",
        matches=lambda run: _data_parallel(run) and run.parallel.zero_stage == 1,
        proof="tests/distributed/test_zero.py",
    ),
    Combination(
        name="ZeRO-2 over data parallelism",
        matches=lambda run: _data_parallel(run) and run.parallel.zero_stage == 2,
        proof="tests/distributed/test_zero.py",
    ),
    Combination(
        name="ZeRO-3 over data parallelism",
        matches=lambda run: _data_parallel(run) and run.parallel.zero_stage == 3,
        proof="tests/distributed/test_zero.py",
    ),
    Combination(
        name="tensor parallelism",
        matches=lambda run: run.parallel.tensor > 1,
        refusal=(
            "parallel.tensor={run.parallel.tensor}: layers are not split over ranks in this version; "
            "add --parallel.tensor 1 (ZeRO-3 spreads weights, gradients and optimizer state over all ranks)."
        ),
    ),
    Combination(
        name="pipeline parallelism",
        matches=lambda run: run.parallel.pipeline > 1,
        refusal=(
            "parallel.pipeline={run.parallel.pipeline}: layers are not dealt into stages in this version; "
            "add --parallel.pipeline 1 (ZeRO-3 spreads weights, gradients and optimizer state over all ranks)."
        ),
    ),
)


def refusals(run: RunConfig) -> list[str]:
    """Why this combination is refused; empty where it is supported."""
    found = [row.refusal.format(run=run) for row in COMBINATIONS if row.refusal and row.matches(run)]
    if not found and not any(row.proof and row.matches(run) for row in COMBINATIONS):
        supported = ", ".join(row.name for row in COMBINATIONS if row.proof)
        found.append(f"this combination of parallel.* is in no row of what is supported: {supported}.")
    return found
