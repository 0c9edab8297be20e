"""The loop without an engine: where a run stands, what is wished for, and the way back to a checkpoint."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from aki_megatron.config.run import WatchConfig
from aki_megatron.data.batch_planner import State
from aki_megatron.data.loader import LoadedStep
from aki_megatron.supervise.loss_spikes import LossSpikeGuard, SpikeError
from aki_megatron.supervise.run_paths import read_metrics
from aki_megatron.train.build import extra_of
from aki_megatron.train.callbacks import CheckpointCallback, MetricsCallback
from aki_megatron.train.loop import Callback, Progress, Run, train
from aki_megatron.train.sample_audit import SampleAuditCallback, read_ledger
from aki_megatron.types import ControlRequest, StepReport

STEPS, EVERY = 10, 4


class Loader:
    """Step n of the data holds the number n; it says where it was asked to begin."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, State | None]] = []
        self.latest = LoadedStep([], 0, 0, {})
        self.closed = False

    def steps(self, start: int, state: State | None) -> Iterator[LoadedStep]:
        self.asked.append((start, state))
        for number in range(start, 1000):
            self.latest = LoadedStep([], number, 1, {"after": number})
            yield self.latest

    def close(self) -> None:
        self.closed = True


@dataclass
class World:
    """A run of one rank whose weights are the numbers of the data it has learnt from."""

    folder: Path
    losses: Mapping[int, float] = field(default_factory=dict)
    """Data step -> loss, where it is not 1."""
    control_signals: Mapping[int, ControlRequest] = field(default_factory=dict)
    """Optimizer step -> what this rank wants when it begins."""
    watch: WatchConfig = WatchConfig(on_non_finite="rollback", max_rollbacks=2)
    learnt: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    saved: dict[int, tuple[list[int], str]] = field(default_factory=dict)
    """Step -> weights and what was saved besides."""

    def run(self, progress: Progress | None = None, judge: Mapping[str, Any] | None = None) -> Run:
        self.progress = progress or Progress()
        self.judge, self.loader = LossSpikeGuard(self.watch, judge), Loader()
        callbacks = [
            Calls(self.calls),
            MetricsCallback(self.folder / "metrics.jsonl"),
            SampleAuditCallback(self.folder / "ledger", lambda: self.loader.latest, data_rank=0, data_size=1),
            CheckpointCallback(Checkpointer(), self.save, EVERY, STEPS, None, at_start=True),  # type: ignore[arg-type]
        ]
        return Run(
            self,
            self.loader,
            callbacks,
            self.judge,
            STEPS,
            float,
            self.progress,
            self.wish,
            self.rollback,
            self.calls.append,
        )  # type: ignore[arg-type]

    def wish(self) -> ControlRequest:
        return self.control_signals.get(self.progress.step + 1, ControlRequest.NONE)

    def train_step(self, batches: Any, lr: float, *, wish: ControlRequest) -> StepReport:
        """What an engine does."""
        data_step = self.loader.latest.consumed
        loss = self.losses.get(data_step, 1.0)
        if accepted := self.judge.accept(loss, 1.0):
            self.learnt.append(data_step)
            self.rates.append(lr)
        return StepReport(loss, 1.0, lr, 1, 1, 1, 0, 0, 0.1, not accepted, wish)

    def save(self, step: int) -> None:
        self.saved[step] = (list(self.learnt), json.dumps(extra_of(self.progress, self.judge)))

    def rollback(self) -> Mapping[str, Any]:
        learnt, extra = self.saved[max(self.saved)]
        self.learnt[:] = learnt
        return json.loads(extra)


class Checkpointer:
    """One that is never behind."""

    def wait(self) -> None:
        return None

    poll = wait


class Calls(Callback):
    """Notes what it is called for."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def on_start(self, step: int) -> None:
        self.calls.append(f"start {step}")

    def on_rollback(self, step: int) -> None:
        self.calls.append(f"rollback {step}")

    def on_stop(self, step: int) -> None:
        self.calls.append(f"stop {step}")

    def on_end(self, step: int) -> None:
        self.calls.append(f"end {step}")


@pytest.fixture
def world(tmp_path: Path) -> Callable[..., World]:
    def make(**facts: Any) -> World:
        return World(tmp_path, **facts)

    return make


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


def consumed(folder: Path) -> list[int]:
    """Data of every step, by the ledger, which holds each step once."""
    return [number for _, number in read_ledger(folder).values()]


def test_undisturbed(world: Callable[..., World]) -> None:
    it = world()
    assert train(it.run()) is True
    assert it.learnt == consumed(it.folder) == list(range(STEPS)) and it.rates == [float(n) for n in range(STEPS)]
    assert steps_of(it.folder) == list(range(1, STEPS + 1))
    assert list(it.saved) == [0, 4, 8, 10] and it.loader.closed
    assert "end 10" in it.calls and "stop 10" not in it.calls


def test_a_rollback_leaves_out_the_data_since_the_checkpoint(world: Callable[..., World]) -> None:
    it = world(losses={6: math.nan})
    assert train(it.run()) is True
    assert it.learnt == [0, 1, 2, 3, 7, 8, 9, 10, 11, 12], "data steps 4 and 5 went with the bad one"
    assert consumed(it.folder) == it.learnt
    assert it.rates[-6:] == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0], "the rate is that of the optimizer step"
    assert steps_of(it.folder) == list(range(1, STEPS + 1))
    assert all(line["loss"] == 1.0 for line in read_metrics(it.folder / "metrics.jsonl"))
    assert it.calls.count("rollback 4") == 1 and it.loader.asked == [(0, {})], "the loader just goes on"
    extra = json.loads(it.saved[8][1])
    assert (extra["step"], extra["data_step"], extra["data"]) == (8, 11, {"after": 10})


def test_a_run_can_go_back_to_its_beginning(world: Callable[..., World]) -> None:
    it = world(losses={0: math.inf, 2: math.nan})
    train(it.run())
    assert it.learnt == consumed(it.folder) == list(range(3, 3 + STEPS))
    assert it.calls.count("rollback 0") == 2


@pytest.mark.parametrize(("checkpoint", "data_step"), [(4, 4), (8, 11)], ids=["soon after it", "later"])
def test_a_run_that_was_killed_after_a_rollback(world: Callable[..., World], checkpoint: int, data_step: int) -> None:
    it = world(losses={6: math.nan})
    train(it.run())
    learnt, extra = it.saved[checkpoint]
    facts = json.loads(extra)
    again = world(losses=it.losses, learnt=list(learnt), saved={checkpoint: (learnt, extra)})
    train(again.run(Progress(facts["step"], facts["data_step"], facts["data"]), facts["judge"]))
    assert again.loader.asked == [(data_step, {"after": data_step - 1})]
    assert again.learnt == it.learnt == consumed(again.folder)
    assert steps_of(again.folder) == list(range(1, STEPS + 1))


def test_too_many_rollbacks_end_the_run(world: Callable[..., World]) -> None:
    it = world(losses={number: math.nan for number in range(6, 100)})
    with pytest.raises(SpikeError, match="max_rollbacks=2"):
        train(it.run())
    assert it.calls.count("rollback 4") == 2 and it.loader.closed
    assert "end 10" not in it.calls and max(it.saved) == 4


def test_a_skipped_step_is_a_step(world: Callable[..., World]) -> None:
    it = world(losses={6: math.nan}, watch=WatchConfig(on_non_finite="skip"))
    train(it.run())
    assert it.learnt == [0, 1, 2, 3, 4, 5, 7, 8, 9] and consumed(it.folder) == list(range(STEPS))
    assert [line["step"] for line in read_metrics(it.folder / "metrics.jsonl") if line["skipped"]] == [7]


def test_a_stop_saves_and_the_next_attempt_goes_on(world: Callable[..., World]) -> None:
    it = world(control_signals={6: ControlRequest.STOP})
    assert train(it.run()) is False
    assert list(it.saved) == [0, 4, 6] and steps_of(it.folder) == list(range(1, 7))
    assert "stop 6" in it.calls and "end 6" not in it.calls and it.loader.closed
    learnt, extra = it.saved[6]
    facts = json.loads(extra)
    again = world(learnt=learnt)
    assert train(again.run(Progress(facts["step"], facts["data_step"], facts["data"]), facts["judge"])) is True
    assert again.learnt == consumed(again.folder) == list(range(STEPS))


def test_a_stop_in_the_last_step_is_the_end(world: Callable[..., World]) -> None:
    it = world(control_signals={STEPS: ControlRequest.STOP})
    assert train(it.run()) is True and f"end {STEPS}" in it.calls


def test_a_stop_in_a_step_that_is_undone_comes_after_the_next(world: Callable[..., World]) -> None:
    it = world(losses={6: math.nan}, control_signals={7: ControlRequest.STOP})
    assert train(it.run()) is False, "what asked for it stays"
    assert it.calls.count("rollback 4") == 1 and max(it.saved) == 7


def test_a_wish_for_a_checkpoint(world: Callable[..., World]) -> None:
    it = world(control_signals={3: ControlRequest.SAVE})
    assert train(it.run()) is True
    assert list(it.saved) == [0, 3, 4, 8, 10]


def test_places_are_told(world: Callable[..., World]) -> None:
    it = world(losses={6: math.nan})
    train(it.run())
    assert it.calls.count("waits for data") == STEPS + 3
    assert it.calls.count("goes back to a checkpoint") == 1 and it.calls[-2:] == ["ends", "end 10"]
