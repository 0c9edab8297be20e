"""The training loop. Everything else is a part it is given (train/build.py) or a hook (train/callbacks.py)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from aki_megatron.data.batch_planner import State
from aki_megatron.data.loader import LoadedStep
from aki_megatron.engine.base import Engine
from aki_megatron.supervise.loss_spikes import LossSpikeGuard, Verdict
from aki_megatron.types import ControlRequest, StepReport


class Callback:
    """Something that happens around steps. Called on every rank; a hook that writes does so on one."""

    def on_start(self, step: int) -> None:
        """Before the first step; ``step`` optimizer steps are already done."""

    def after_step(self, step: int, report: StepReport) -> None:
        """After optimizer step number ``step`` (counted from 1)."""

    def on_rollback(self, step: int) -> None:
        """The steps after ``step`` never were: the run is back at a checkpoint, and does them with other data."""

    def on_stop(self, step: int) -> None:
        """After the last step of an attempt that was asked to stop; the run goes on from there another time."""
        self.on_end(step)

    def on_end(self, step: int) -> None:
        """After the last step; not called when the run fails."""


class StepSource(Protocol):
    """This rank's endless stream of steps (data/loader.py)."""

    def steps(self, start: int, state: State | None) -> Iterator[LoadedStep]:
        """Each step of the data from number ``start`` (from 0); ``state`` is that of the step before it."""

    def close(self) -> None:
        """Stop background work."""


@dataclass
class Progress:
    """Where a run stands: the loop moves it on, a checkpoint keeps it."""

    step: int = 0
    """Optimizer steps that the engine's state has seen."""
    data_step: int = 0
    """Steps of the data that are used up: more than ``step`` once a rollback has left some out."""
    data: State = field(default_factory=dict)
    """Where the data stand after those."""


@dataclass(frozen=True)
class Run:
    """A run, built."""

    engine: Engine
    loader: StepSource
    callbacks: Sequence[Callback]
    judge: LossSpikeGuard
    steps: int
    learning_rate: Callable[[int], float]
    """Rate of the optimizer step with this number, counted from 0."""
    progress: Progress
    control_signals: Callable[[], ControlRequest]
    """What this rank wants done after the step that begins."""
    rollback: Callable[[], Mapping[str, Any]]
    """Load the newest checkpoint into the engine; what was saved with it. Collective."""
    at: Callable[[str], None]
    """Told what this rank does; cheap."""


def train(run: Run) -> bool:
    """Train until ``run.steps`` optimizer steps are done, or until a rank wants to stop; whether the run is done."""
    progress, control_signals = run.progress, ControlRequest.NONE
    for hook in run.callbacks:
        hook.on_start(progress.step)
    try:
        steps = run.loader.steps(progress.data_step, progress.data)
        while progress.step < run.steps and ControlRequest.STOP not in control_signals:
            run.at("waits for data")
            loaded = next(steps)
            report = run.engine.train_step(loaded.batches, run.learning_rate(progress.step), wish=run.control_signals())
            progress.data_step += 1
            progress.data = loaded.state
            if run.judge.after(progress.step + 1, report) is Verdict.ROLL_BACK:
                roll_back(run)
                continue
            progress.step += 1
            run.at("callbacks")
            for hook in run.callbacks:
                hook.after_step(progress.step, report)
            control_signals = report.wish
    finally:
        run.loader.close()
    done = progress.step >= run.steps
    run.at("ends")
    for hook in run.callbacks:
        if done:
            hook.on_end(progress.step)
        else:
            hook.on_stop(progress.step)
    return done


def roll_back(run: Run) -> None:
    """Go back to the newest checkpoint, but not in the data: those of the steps since are left out."""
    run.at("goes back to a checkpoint")
    saved = run.rollback()
    run.progress.step = saved["step"]
    run.judge.rewind(saved["step"], saved["judge"])
    for hook in run.callbacks:
        hook.on_rollback(saved["step"])
