"""The training loop. Everything else is a part it is given (train/build.py) or a callback (train/callbacks.py)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

from aki_megatron.data.batch_planner import DataState
from aki_megatron.data.loader import LoadedStep
from aki_megatron.engine.base import Engine
from aki_megatron.supervise.evaluations import Evaluation
from aki_megatron.supervise.loss_spikes import LossSpikeAction, LossSpikeGuard
from aki_megatron.supervise.progress import FINISHING, ROLLING_BACK
from aki_megatron.supervise.validations import ValidationReport
from aki_megatron.train.validation import Validator
from aki_megatron.types import ControlRequest, StepReport


class Callback:
    """Base of what happens around steps. Methods are called on every rank; a callback that writes exists on one."""

    required: ClassVar[bool] = False
    """Whether an error of this callback ends the run; otherwise it ends this callback only (train/side_output.py)."""

    def on_start(self, step: int) -> None:
        """Before the first step of an attempt, when ``step`` optimizer steps are done."""

    def on_step(self, step: int, report: StepReport) -> None:
        """After optimizer step number ``step``, counted from 1."""

    def on_validation(self, step: int, report: ValidationReport) -> None:
        """After a validation: after ``on_step`` of the same step, or after ``on_start``."""

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """Scores have come of an earlier checkpoint; before ``on_step`` of step number ``step``, on rank 0 only."""

    def on_step_end(self, step: int, report: StepReport) -> None:
        """After ``on_step`` of all callbacks and validation; ``report.control`` has what was asked for until now."""

    def on_rollback(self, step: int) -> None:
        """Training was rolled back to ``step``; discard later records. The steps are repeated with other data."""

    def on_stop(self, step: int) -> None:
        """After the last step of an attempt that was asked to stop, to be resumed later."""
        self.on_end(step)

    def on_end(self, step: int) -> None:
        """After the last step of the run; not called when the run fails."""

    def on_failure(self) -> None:
        """After another method of a callback that is not required has failed; none is called any more."""


def _go_on(_data_step: int) -> None:
    pass


class StepSource(Protocol):
    """This rank's endless stream of batches (data/loader.py)."""

    def steps(self, start: int, state: DataState | None) -> Iterator[LoadedStep]:
        """Yield the data steps from number ``start`` (from 0); ``state`` is that of the step before it."""

    def close(self) -> None:
        """Stop background work."""


@dataclass
class TrainState:
    """How far a run is: the loop advances it, checkpoints hold it."""

    step: int = 0
    """Optimizer steps done."""
    data_step: int = 0
    """Data steps used: more than ``step`` once a rollback has skipped some."""
    data: DataState = field(default_factory=dict)
    """DataState of the data after those."""


@dataclass(frozen=True)
class Trainer:
    """All parts of a run, and the loop over them."""

    engine: Engine
    loader: StepSource
    callbacks: Sequence[Callback]
    loss_spike_guard: LossSpikeGuard
    steps: int
    """Optimizer steps of the whole run."""
    learning_rate: Callable[[int], float]
    """Learning rate of the optimizer step with this number, counted from 0."""
    state: TrainState
    poll_control: Callable[[], ControlRequest]
    """Returns what this rank wants done after the step that begins."""
    load_latest: Callable[[], Mapping[str, Any]]
    """Loads the newest checkpoint into the engine; returns what was saved with it. Collective."""
    set_phase: Callable[[str], None]
    """Told what this rank does (supervise/progress.py)."""
    begin_data_step: Callable[[int], None] = _go_on
    """Called before the optimizer step that uses the data step with this number, counted from 0; collective. It changes
    what trains at the border of a phase."""
    validator: Validator | None = None
    """None: no validation."""

    def train(self) -> bool:
        """Train until ``steps`` optimizer steps are done, or a rank asks to stop; return whether the run is done."""
        state, control = self.state, ControlRequest.NONE
        for callback in self.callbacks:
            callback.on_start(state.step)
        try:
            control = self._validate(is_saved_next=False)
            steps = self.loader.steps(state.data_step, state.data)
            while state.step < self.steps and ControlRequest.STOP not in control:
                self.set_phase("waiting for data")
                loaded = next(steps)
                rate, request = self.learning_rate(state.step), self.poll_control()
                self.begin_data_step(state.data_step)
                report = self.engine.train_step(loaded.batches, rate, control=request)
                state.data_step += 1
                state.data = loaded.next_state
                if self.loss_spike_guard.on_step(state.step + 1, report) is LossSpikeAction.ROLLBACK:
                    self._roll_back()
                    continue
                state.step += 1
                self.set_phase("callbacks")
                for callback in self.callbacks:
                    callback.on_step(state.step, report)
                control = report.control
                if ControlRequest.STOP not in control:
                    control |= self._validate()
                self.set_phase("callbacks")
                for callback in self.callbacks:
                    callback.on_step_end(state.step, replace(report, control=control))
        finally:
            self.loader.close()
        done = state.step >= self.steps
        self.set_phase(FINISHING)
        for callback in self.callbacks:
            if done:
                callback.on_end(state.step)
            else:
                callback.on_stop(state.step)
        return done

    def _validate(self, *, is_saved_next: bool = True) -> ControlRequest:
        """Validate where that is due; return STOP when a rank was asked to stop meanwhile."""
        step = self.state.step
        if self.validator is None or not self.validator.is_due(step):
            return ControlRequest.NONE
        report = self.validator.run(step, is_saved_next=is_saved_next)
        if report is None:
            return ControlRequest.STOP
        self.set_phase("callbacks")
        for callback in self.callbacks:
            callback.on_validation(step, report)
        return ControlRequest.NONE

    def _roll_back(self) -> None:
        """Load the newest checkpoint, but keep the position in the data: the data of the steps since are skipped."""
        self.set_phase(ROLLING_BACK)
        saved = self.load_latest()
        self.state.step = saved["step"]
        self.loss_spike_guard.on_rollback(saved["step"], saved["loss_spike_guard"])
        if self.validator is not None:
            self.validator.load_state_dict(saved.get("validation"))
        for callback in self.callbacks:
            callback.on_rollback(saved["step"])
