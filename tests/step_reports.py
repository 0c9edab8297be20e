"""A StepReport for tests of what is done with one."""

from typing import Any

from aki_megatron.types import StepReport


def step_report(loss: float = 1.5, **changes: Any) -> StepReport:
    """Return a report of a step of two images and 40 tokens in 50 positions, taken in half a second."""
    fields: dict[str, Any] = {
        "grad_norm": 2.0, "lr": 1e-3, "supervised_tokens": 7, "tokens": 40, "positions": 50, "images": 2,
        "bad_samples": 0, "seconds": 0.5, "skipped": False,
    }  # fmt: skip
    return StepReport(loss=loss, **fields | changes)
