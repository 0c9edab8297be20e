"""Detect steps whose loss or gradient norm is not finite or far above the median, and apply the configured policy.

The guard decides from numbers that are equal on every rank, so all ranks decide alike. Its state is in every
checkpoint, so that a resumed run decides as an uninterrupted one.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any, Literal

from aki_megatron.config.run import WatchConfig
from aki_megatron.errors import UserError
from aki_megatron.supervise.events import EventRecorder, ignore_event
from aki_megatron.types import StepReport

LOWER_LR = "--allow_change optimizer.lr --optimizer.lr LOWER"
"""Flags with which a run goes on at another learning rate."""

MAX_CONSECUTIVE_SPIKES = 10
"""After this many consecutive skipped spikes, treat them as a level shift and stop: the median would never adapt."""


class LossSpikeAction(Enum):
    """What the loop does after a step."""

    CONTINUE = "continue"
    ROLLBACK = "rollback"


class LossSpikeError(UserError):
    """The run cannot continue under the policy of its ``watch`` section."""


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a step, and the policy for it."""

    kind: Literal["non_finite", "loss_spike"]
    policy: Literal["skip", "rollback", "stop"]
    text: str


class LossSpikeGuard:
    """Decide about every step, before its update and after it; the same on all ranks.

    Refused steps do not enter the median.
    """

    def __init__(
        self,
        watch: WatchConfig,
        state: Mapping[str, Any] | None = None,
        *,
        record_event: EventRecorder = ignore_event,
    ) -> None:
        """Create a guard; ``state`` is the ``state_dict`` in the checkpoint from which the run resumes."""
        self._watch = watch
        self._record_event = record_event
        self._bad_step = 0
        self._last_rollback_step: int | None = None
        self._rollbacks = 0
        """Consecutive rollbacks to ``_last_rollback_step``."""
        self._load(state or {})

    def should_step(self, loss: float, grad_norm: float) -> bool:
        """Return whether the optimizer may apply a gradient of this global norm."""
        return self._find_fault(loss, grad_norm) is None

    def on_step(self, step: int, report: StepReport) -> LossSpikeAction:
        """Decide what follows step number ``step`` (counted from 1). Raises LossSpikeError when the run must stop."""
        fault = self._find_fault(report.loss, report.grad_norm)
        if fault is None:
            self._losses.append(report.loss)
            self._grad_norms.append(report.grad_norm)
            self._consecutive_spikes = 0
            return LossSpikeAction.CONTINUE
        self._bad_step = step
        self._record_event(step, fault.kind, f"{fault.text}; policy: {fault.policy}")
        if fault.policy == "rollback":
            return LossSpikeAction.ROLLBACK
        if fault.policy == "stop":
            raise LossSpikeError(
                f"Step {step}: {fault.text}, and watch.on_{fault.kind} is stop. Check the data of the step, lower "
                f"optimizer.lr ({LOWER_LR}), or resume from the last checkpoint with --watch.on_{fault.kind} rollback."
            )
        self._consecutive_spikes += fault.kind == "loss_spike"
        if self._consecutive_spikes >= MAX_CONSECUTIVE_SPIKES:
            raise LossSpikeError(
                f"Step {step}: {fault.text}, as in {self._consecutive_spikes} steps in a row, all of them skipped. "
                f"This is a level shift rather than a spike: lower optimizer.lr ({LOWER_LR}) and resume from an "
                "earlier checkpoint (remove the newer ones), or raise watch.loss_spike_factor if the data have changed."
            )
        return LossSpikeAction.CONTINUE

    def on_rollback(self, step: int, state: Mapping[str, Any] | None) -> None:
        """Continue from the checkpoint of ``step``, with the data after the bad step.

        ``state`` is the ``state_dict`` in that checkpoint. Raises LossSpikeError when the run has rolled back to that
        checkpoint more than watch.max_rollbacks times.
        """
        self._rollbacks = self._rollbacks + 1 if step == self._last_rollback_step else 1
        self._last_rollback_step = step
        limit = self._watch.max_rollbacks
        if self._rollbacks > limit:
            raise LossSpikeError(
                f"Step {self._bad_step}: the run rolled back to the checkpoint of step {step} {limit} times already "
                f"(watch.max_rollbacks={limit}), each time with other data, so the data are not the cause: lower "
                f"optimizer.lr ({LOWER_LR}), or resume from an earlier checkpoint (remove the newest)."
            )
        self._record_event(
            self._bad_step,
            "rollback",
            f"to the checkpoint of step {step}, skipping the data of the steps since; {self._rollbacks} of {limit}",
        )
        self._load(state or {})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "losses": list(self._losses),
            "grad_norms": list(self._grad_norms),
            "consecutive_spikes": self._consecutive_spikes,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        window = self._watch.loss_spike_window
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=window)
        self._grad_norms: deque[float] = deque(state.get("grad_norms", ()), maxlen=window)
        self._consecutive_spikes = state.get("consecutive_spikes", 0)

    def _find_fault(self, loss: float, grad_norm: float) -> _Fault | None:
        """Return what is wrong with a step; the same before its update and after it."""
        watch = self._watch
        values = (("loss", loss, self._losses), ("gradient norm", grad_norm, self._grad_norms))
        for name, value, _ in values:
            if not math.isfinite(value):
                return _Fault("non_finite", watch.on_non_finite, f"the {name} is not finite")
        if watch.on_loss_spike == "off" or len(self._losses) < watch.loss_spike_window:
            return None
        for name, value, window in values:
            typical = median(window)
            if value > watch.loss_spike_factor * typical:
                ratio = f"{value / typical:.1f} times" if typical > 0 else "above"
                text = f"the {name} {value:.4g} is {ratio} the median of the last {len(window)} steps, {typical:.4g}"
                return _Fault("loss_spike", watch.on_loss_spike, text)
        return None
