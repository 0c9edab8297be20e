"""The training loop. Everything else is a part it is given (train/build.py) or a hook (train/hooks.py)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from aki_megatron.data.loader import LoadedStep
from aki_megatron.data.steps import State
from aki_megatron.engine.base import Engine
from aki_megatron.flow import StepReport


class Hook(Protocol):
    """Something that happens around steps. Called on every rank; a hook that writes does so on one."""

    def on_start(self, step: int) -> None:
        """Before the first step; ``step`` optimizer steps are already done."""

    def after_step(self, step: int, report: StepReport) -> None:
        """After optimizer step number ``step`` (counted from 1)."""

    def on_end(self, step: int) -> None:
        """After the last step; not called when the run fails."""


class StepSource(Protocol):
    """This rank's endless stream of steps (data/loader.py)."""

    def steps(self, start: int, state: State | None) -> Iterator[LoadedStep]:
        """Each optimizer step from number ``start`` (counted from 0); ``state`` is that of the step before it."""

    def close(self) -> None:
        """Stop background work."""


@dataclass(frozen=True)
class Run:
    """A run, built."""

    engine: Engine
    loader: StepSource
    hooks: Sequence[Hook]
    steps: int
    learning_rate: Callable[[int], float]
    """Rate of the optimizer step with this number, counted from 0."""
    step: int
    """Optimizer steps that the engine's state has seen already: 0, or those of the checkpoint it was restored from."""
    data_state: State | None = None
    """Where the data stand after those steps, as the checkpoint says."""


def train(run: Run) -> None:
    """Train until ``run.steps`` optimizer steps are done."""
    step = run.step
    for hook in run.hooks:
        hook.on_start(step)
    try:
        steps = run.loader.steps(step, run.data_state)
        while step < run.steps:
            report = run.engine.train_step(next(steps).batches, run.learning_rate(step))
            step += 1
            for hook in run.hooks:
                hook.after_step(step, report)
    finally:
        run.loader.close()
    for hook in run.hooks:
        hook.on_end(step)
