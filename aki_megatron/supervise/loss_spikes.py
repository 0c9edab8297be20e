"""Steps whose loss or gradient is not finite, or far above what is usual, and what is to be done about them.

The judge decides from numbers that are the same on every rank, so all ranks decide alike; its state is in every
checkpoint, so that a run that was started again decides as one that was never interrupted.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any, Literal

from aki_megatron.config.run import WatchConfig
from aki_megatron.errors import UserError
from aki_megatron.supervise.events import Kind
from aki_megatron.types import StepReport

MOST_SPIKES_IN_A_ROW = 10
"""So many skipped spikes, one after another, are no spikes but a new level; the median would never learn it."""

Note = Callable[[int, Kind, str], None]
"""Step, kind of event, what happened."""


class Verdict(Enum):
    """What the loop does after a step."""

    GO_ON = "go on"
    ROLL_BACK = "roll back"


class SpikeError(UserError):
    """The run cannot go on by the policy of its ``watch`` section."""


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a step, and what the configuration says about that."""

    kind: Literal["non_finite", "spike"]
    policy: Literal["skip", "rollback", "stop"]
    text: str


def _note_nothing(_step: int, _kind: Kind, _text: str) -> None:
    pass


class LossSpikeGuard:
    """Decides about every step, before its update and after it; the same on all ranks.

    A step that is refused does not count among those whose median is the measure.
    """

    def __init__(
        self, watch: WatchConfig, state: Mapping[str, Any] | None = None, *, note: Note = _note_nothing
    ) -> None:
        """``state``: what ``state`` returned when the checkpoint was saved from which the run goes on."""
        self._watch = watch
        self._note = note
        self._bad_step = 0
        self._rolled_back_to: int | None = None
        self._rollbacks = 0
        self._spikes_in_a_row = 0
        self._take(state or {})

    def accept(self, loss: float, norm: float) -> bool:
        """Whether the optimizer may move by a gradient of this global norm."""
        return self._fault(loss, norm) is None

    def after(self, step: int, report: StepReport) -> Verdict:
        """What to do after step number ``step`` (counted from 1).

        Errors: SpikeError when the run has to stop.
        """
        fault = self._fault(report.loss, report.grad_norm)
        if fault is None:
            self._losses.append(report.loss)
            self._norms.append(report.grad_norm)
            self._spikes_in_a_row = 0
            return Verdict.GO_ON
        self._bad_step = step
        self._note(step, fault.kind, f"{fault.text}; policy: {fault.policy}")
        if fault.policy == "rollback":
            return Verdict.ROLL_BACK
        if fault.policy == "stop":
            raise SpikeError(
                f"Step {step}: {fault.text}, and watch.{fault.kind} is stop. Look at the data of the step, lower "
                f"optimizer.lr, or go on from the last checkpoint with --watch.{fault.kind} rollback."
            )
        self._spikes_in_a_row += fault.kind == "spike"
        if self._spikes_in_a_row >= MOST_SPIKES_IN_A_ROW:
            raise SpikeError(
                f"Step {step}: {fault.text}; so it was in {self._spikes_in_a_row} steps in a row, and none of them was "
                "learnt from. That is no spike but a new level: lower optimizer.lr and go on from an earlier "
                "checkpoint, or raise watch.loss_spike_factor if the data have changed."
            )
        return Verdict.GO_ON

    def rewind(self, step: int, state: Mapping[str, Any] | None) -> None:
        """The run goes on from the checkpoint of ``step``, with the data after the bad step.

        state  the judge's state in that checkpoint

        Errors: SpikeError when the run went back to that checkpoint too often.
        """
        self._rollbacks = self._rollbacks + 1 if step == self._rolled_back_to else 1
        self._rolled_back_to = step
        most = self._watch.max_rollbacks
        if self._rollbacks > most:
            raise SpikeError(
                f"Step {self._bad_step}: the run went back to the checkpoint of step {step} {most} times already "
                f"(watch.max_rollbacks={most}), each time with other data. So it is not the data: lower optimizer.lr, "
                "or go on from an earlier checkpoint (remove the newest)."
            )
        self._note(
            self._bad_step,
            "rollback",
            f"back to the checkpoint of step {step}, without the data of the steps since; {self._rollbacks} of {most}",
        )
        self._take(state or {})

    def state(self) -> dict[str, Any]:
        """What a judge needs to go on as this one; JSON can hold it."""
        return {
            "losses": list(self._losses),
            "norms": list(self._norms),
            "spikes_in_a_row": self._spikes_in_a_row,
        }

    def _take(self, state: Mapping[str, Any]) -> None:
        window = self._watch.loss_spike_window
        self._losses: deque[float] = deque(state.get("losses", ()), maxlen=window)
        self._norms: deque[float] = deque(state.get("norms", ()), maxlen=window)
        self._spikes_in_a_row = state.get("spikes_in_a_row", 0)

    def _fault(self, loss: float, norm: float) -> _Fault | None:
        """What is wrong with a step; the same before its update and after it."""
        watch = self._watch
        numbers = (("loss", loss, self._losses), ("gradient norm", norm, self._norms))
        for name, value, _ in numbers:
            if not math.isfinite(value):
                return _Fault("non_finite", watch.on_non_finite, f"the {name} is not finite")
        if watch.on_loss_spike == "off" or len(self._losses) < watch.loss_spike_window:
            return None
        for name, value, window in numbers:
            usual = median(window)
            if value > watch.loss_spike_factor * usual:
                times = f"{value / usual:.1f} times" if usual > 0 else "above"
                text = f"the {name} {value:.4g} is {times} the median of the last {len(window)} steps, {usual:.4g}"
                return _Fault("spike", watch.on_loss_spike, text)
        return None
