"""The training loop without an engine: steps, save and stop requests, rollbacks, resumed runs."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from step_reports import step_report

from aki_megatron.config.run import WatchConfig
from aki_megatron.data.batch_planner import DataState
from aki_megatron.data.loader import LoadedStep
from aki_megatron.supervise.loss_spikes import LossSpikeError, LossSpikeGuard
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.progress import FINISHING, ROLLING_BACK
from aki_megatron.train.build import checkpoint_extra
from aki_megatron.train.callbacks import MetricsCallback
from aki_megatron.train.checkpoint_callback import CheckpointCallback
from aki_megatron.train.loop import Callback, Trainer, TrainState
from aki_megatron.train.sample_audit import SampleAuditCallback, read_sample_audit
from aki_megatron.types import ControlRequest, StepReport

STEPS, INTERVAL = 10, 4


class NumberLoader:
    """Data step n holds the number n; records where it was asked to start."""

    def __init__(self) -> None:
        self.started_at: list[tuple[int, DataState | None]] = []
        self.last = LoadedStep([], 0, 0, {})
        self.closed = False

    def steps(self, start: int, state: DataState | None) -> Iterator[LoadedStep]:
        self.started_at.append((start, state))
        for number in range(start, 1000):
            self.last = LoadedStep([], number, 1, {"after": number})
            yield self.last

    def close(self) -> None:
        self.closed = True


@dataclass
class SimulatedRun:
    """A run of one rank whose weights are the numbers of the data it was trained on."""

    folder: Path
    losses: Mapping[int, float] = field(default_factory=dict)
    """Data step -> loss, where it is not 1."""
    requests: Mapping[int, ControlRequest] = field(default_factory=dict)
    """Optimizer step -> what this rank wants when it begins."""
    watch: WatchConfig = WatchConfig(on_non_finite="rollback", max_rollbacks=2)
    weights: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    saved: dict[int, tuple[list[int], str]] = field(default_factory=dict)
    """Step -> weights and checkpoint_extra as JSON."""

    def train(self, extra: Mapping[str, Any] | None = None) -> bool:
        """Train from the start, or from the state in the checkpoint_extra ``extra``; return whether the run is done."""
        self.state = TrainState(extra["step"], extra["data_step"], extra["data"]) if extra else TrainState()
        self.guard = LossSpikeGuard(self.watch, extra["loss_spike_guard"] if extra else None)
        self.loader = NumberLoader()
        trainer = Trainer(
            engine=self,  # type: ignore[arg-type]
            loader=self.loader,
            callbacks=[
                CallRecorder(self.calls),
                MetricsCallback(self.folder / "metrics.jsonl"),
                SampleAuditCallback(self.folder / "sample_audit", lambda: self.loader.last, data_rank=0, data_size=1),
                CheckpointCallback(IdleCheckpointer(), self.save, INTERVAL, STEPS, None, save_at_start=True),  # type: ignore[arg-type]
            ],
            loss_spike_guard=self.guard,
            steps=STEPS,
            learning_rate=float,
            state=self.state,
            poll_control=lambda: self.requests.get(self.state.step + 1, ControlRequest.NONE),
            load_latest=self.load_latest,
            set_phase=self.calls.append,
        )
        return trainer.train()

    def train_step(self, batches: Any, lr: float, *, control: ControlRequest) -> StepReport:
        """Do what an engine does."""
        data_step = self.loader.last.samples_hash
        loss = self.losses.get(data_step, 1.0)
        if applied := self.guard.should_step(loss, 1.0):
            self.weights.append(data_step)
            self.rates.append(lr)
        return step_report(loss, grad_norm=1.0, lr=lr, skipped=not applied, control=control)

    def save(self, step: int, keep_older: bool) -> None:
        self.saved[step] = (list(self.weights), json.dumps(checkpoint_extra(self.state, self.guard)))

    def load_latest(self) -> Mapping[str, Any]:
        self.weights[:], extra = self.saved[max(self.saved)]
        return json.loads(extra)


class IdleCheckpointer:
    """One that never has a save in progress."""

    def wait(self) -> None:
        return None

    poll = wait


class CallRecorder(Callback):
    """Records what it is called for."""

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
def simulate(tmp_path: Path) -> Callable[..., SimulatedRun]:
    def make(**fields: Any) -> SimulatedRun:
        return SimulatedRun(tmp_path, **fields)

    return make


def logged_steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder / "metrics.jsonl")]


def audited_data(folder: Path) -> list[int]:
    """Data of every step, by the sample audit log, which holds each step once."""
    return [step.samples_hash for step in read_sample_audit(folder).values()]


def test_an_uninterrupted_run(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate()
    assert run.train() is True
    assert run.weights == audited_data(run.folder) == list(range(STEPS))
    assert run.rates == [float(step) for step in range(STEPS)]
    assert logged_steps(run.folder) == list(range(1, STEPS + 1))
    assert list(run.saved) == [0, 4, 8, 10] and run.loader.closed
    assert "end 10" in run.calls and "stop 10" not in run.calls


def test_a_rollback_skips_the_data_since_the_checkpoint(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses={6: math.nan})
    assert run.train() is True
    assert run.weights == [0, 1, 2, 3, 7, 8, 9, 10, 11, 12], "data steps 4 and 5 are skipped with the bad one"
    assert audited_data(run.folder) == run.weights
    assert run.rates[-6:] == [4.0, 5.0, 6.0, 7.0, 8.0, 9.0], "the rate is that of the optimizer step"
    assert logged_steps(run.folder) == list(range(1, STEPS + 1))
    assert all(line["loss"] == 1.0 for line in read_metrics(run.folder / "metrics.jsonl"))
    assert run.calls.count("rollback 4") == 1 and run.loader.started_at == [(0, {})], "the loader just continues"
    extra = json.loads(run.saved[8][1])
    assert (extra["step"], extra["data_step"], extra["data"]) == (8, 11, {"after": 10})


def test_a_run_can_roll_back_to_its_start(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses={0: math.inf, 2: math.nan})
    run.train()
    assert run.weights == audited_data(run.folder) == list(range(3, 3 + STEPS))
    assert run.calls.count("rollback 0") == 2


@pytest.mark.parametrize(("checkpoint", "data_step"), [(4, 4), (8, 11)], ids=["soon after it", "later"])
def test_a_run_that_was_killed_after_a_rollback(
    simulate: Callable[..., SimulatedRun], checkpoint: int, data_step: int
) -> None:
    run = simulate(losses={6: math.nan})
    run.train()
    weights, extra = run.saved[checkpoint]
    resumed = simulate(losses=run.losses, weights=list(weights), saved={checkpoint: (weights, extra)})
    resumed.train(json.loads(extra))
    assert resumed.loader.started_at == [(data_step, {"after": data_step - 1})]
    assert resumed.weights == run.weights == audited_data(resumed.folder)
    assert logged_steps(run.folder) == list(range(1, STEPS + 1))


def test_too_many_rollbacks_end_the_run(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses={number: math.nan for number in range(6, 100)})
    with pytest.raises(LossSpikeError, match="max_rollbacks=2"):
        run.train()
    assert run.calls.count("rollback 4") == 2 and run.loader.closed
    assert "end 10" not in run.calls and max(run.saved) == 4


def test_a_skipped_step_counts_as_a_step(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses={6: math.nan}, watch=WatchConfig(on_non_finite="skip"))
    run.train()
    assert run.weights == [0, 1, 2, 3, 4, 5, 7, 8, 9] and audited_data(run.folder) == list(range(STEPS))
    assert [line["step"] for line in read_metrics(run.folder / "metrics.jsonl") if line["skipped"]] == [7]


def test_a_stop_saves_and_the_next_attempt_resumes(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(requests={6: ControlRequest.STOP})
    assert run.train() is False
    assert list(run.saved) == [0, 4, 6] and logged_steps(run.folder) == list(range(1, 7))
    assert "stop 6" in run.calls and "end 6" not in run.calls and run.loader.closed
    weights, extra = run.saved[6]
    resumed = simulate(weights=weights)
    assert resumed.train(json.loads(extra)) is True
    assert resumed.weights == audited_data(resumed.folder) == list(range(STEPS))


def test_a_stop_in_the_last_step_is_the_end(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(requests={STEPS: ControlRequest.STOP})
    assert run.train() is True and f"end {STEPS}" in run.calls


def test_a_stop_in_a_step_that_is_rolled_back_comes_after_the_next(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses={6: math.nan}, requests={7: ControlRequest.STOP})
    assert run.train() is False, "the request persists"
    assert run.calls.count("rollback 4") == 1 and max(run.saved) == 7


def test_a_save_request(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(requests={3: ControlRequest.SAVE})
    assert run.train() is True
    assert list(run.saved) == [0, 3, 4, 8, 10]


def test_phases_are_reported(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses={6: math.nan})
    run.train()
    assert run.calls.count("waiting for data") == STEPS + 3
    assert run.calls.count(ROLLING_BACK) == 1 and run.calls[-2:] == [FINISHING, "end 10"]
