"""metrics.jsonl: one JSON object per optimizer step. No torch here: tools read it."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aki_megatron.supervise.jsonl import has_step, read_lines

if TYPE_CHECKING:
    from aki_megatron.types import StepReport

NOT_METRICS = {"control"}
"""Fields of StepReport that are not logged."""


def metrics_of(step: int, report: StepReport) -> dict[str, Any]:
    """Return the metrics of one step: its number, the fields of the report, and tokens_per_second.

    Values that are not finite (loss and norm of a skipped step) become None: JSON has no such numbers.
    """
    fields = {name: value for name, value in asdict(report).items() if name not in NOT_METRICS}
    metrics = {"step": step} | fields | {"tokens_per_second": report.tokens / max(report.seconds, 1e-9)}
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, one per step. Raises DataError that names a damaged line."""
    return read_lines(path, has_step)
