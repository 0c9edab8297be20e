"""When a run validates, and what follows: the record, the best checkpoint, stops, resumed runs, rollbacks."""

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from step_reports import step_report

from aki_megatron.config.run import WatchConfig
from aki_megatron.console import Console
from aki_megatron.data.batch_planner import DataState
from aki_megatron.data.loader import LoadedStep
from aki_megatron.supervise.loss_spikes import LossSpikeGuard
from aki_megatron.supervise.progress import VALIDATING, ProgressTracker
from aki_megatron.supervise.validations import (
    SourceValidation,
    ValidationReport,
    line_of,
    read_validations,
    scalars_of,
)
from aki_megatron.train.best_checkpoint import BestCheckpoint
from aki_megatron.train.build import checkpoint_extra
from aki_megatron.train.callbacks import ConsoleCallback, TensorBoardCallback
from aki_megatron.train.checkpoint_callback import CheckpointCallback
from aki_megatron.train.loop import Trainer, TrainState
from aki_megatron.train.validation import Validator
from aki_megatron.train.validation_log import ValidationLogCallback
from aki_megatron.types import ControlRequest, StepReport

STEPS = 10


class EndlessLoader:
    def steps(self, start: int, state: DataState | None) -> Iterator[LoadedStep]:
        while True:
            yield LoadedStep([], 0, 1, {})

    def close(self) -> None:
        pass


@dataclass
class SimulatedRun:
    """A run of one rank; a validation after step s has the loss ``losses[s]``."""

    folder: Path
    losses: Mapping[int, float] = field(default_factory=dict)
    interval: int = 2
    checkpoint_interval: int = 5
    at_start: bool = False
    settings: str = "a"
    stop_in: int | None = None
    """Step whose validation is asked to stop."""
    spikes: tuple[int, ...] = ()
    saved: dict[int, str] = field(default_factory=dict)
    """Step -> extra of its checkpoint."""
    named: list[int | None] = field(default_factory=list)
    """What ``best`` names after each save."""
    phases: list[str] = field(default_factory=list)

    def train(self, extra: Mapping[str, Any] | None = None) -> bool:
        self.state = TrainState(extra["step"], extra["data_step"], extra["data"]) if extra else TrainState()
        guard = LossSpikeGuard(WatchConfig(on_non_finite="rollback"), extra["loss_spike_guard"] if extra else None)
        self.guard = guard
        self.validator = Validator(
            self,  # type: ignore[arg-type]
            ["a", "b"],
            interval=self.interval,
            steps=STEPS,
            at_start=self.at_start,
            validation_set=None,
            questions=None,
            best=BestCheckpoint(self.saved.__contains__, self.named.append),
            settings=self.settings,
            sum_over_world=self.sum_over_world,
            poll_control=lambda: ControlRequest.STOP if self.state.step == self.stop_in else ControlRequest.NONE,
            set_phase=self.phases.append,
        )
        if extra:
            self.validator.load_state_dict(extra.get("validation"))
        self.out = io.StringIO()
        trainer = Trainer(
            engine=self,  # type: ignore[arg-type]
            loader=EndlessLoader(),
            callbacks=[
                ValidationLogCallback(self.folder / "validation.jsonl"),
                ConsoleCallback(STEPS, 1, Console(self.out, width=200)),
                CheckpointCallback(Idle(), self.save, self.checkpoint_interval, STEPS, None),  # type: ignore[arg-type]
            ],
            loss_spike_guard=guard,
            steps=STEPS,
            learning_rate=float,
            state=self.state,
            poll_control=lambda: ControlRequest.NONE,
            load_latest=lambda: json.loads(self.saved[max(self.saved)]),
            set_phase=self.phases.append,
            validator=self.validator,
        )
        return trainer.train()

    def sum_over_world(self, numbers: list[float]) -> list[float]:
        """Put the loss of this step where the losses of a rank that reads data would be."""
        if len(numbers) == 12:
            loss = self.losses.get(self.state.step, 1.0)
            return [3 * loss, 3, 2, 1, 4, 3, loss, 1, 1, 0, 0, 0]
        return [float(number) for number in numbers]

    def train_step(self, batches: Any, lr: float, *, control: ControlRequest) -> StepReport:
        bad = self.state.data_step in self.spikes
        return step_report(math.nan if bad else 1.0, skipped=bad, control=control)

    def save(self, step: int, keep_older: bool) -> None:
        self.named.append(self.validator.best_step(step))
        self.saved[step] = json.dumps(checkpoint_extra(self.state, self.guard, validator=self.validator))


class Idle:
    def wait(self) -> None:
        return None

    poll = wait


@pytest.fixture
def simulate(tmp_path: Path) -> Callable[..., SimulatedRun]:
    def make(**fields: Any) -> SimulatedRun:
        return SimulatedRun(tmp_path, **fields)

    return make


def validated(run: SimulatedRun) -> list[tuple[int, float, bool]]:
    return [(line["step"], line["loss"], line["is_best"]) for line in read_validations(run.folder / "validation.jsonl")]


LOSSES = {2: 3.0, 4: 2.0, 6: 4.0, 8: 1.5, 10: 1.8}


def test_the_best_of_an_uninterrupted_run_is_saved(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses=LOSSES)
    assert run.train() is True
    assert validated(run) == [(2, 3.0, True), (4, 2.0, True), (6, 4.0, False), (8, 1.5, True), (10, 1.8, False)]
    assert list(run.saved) == [2, 4, 5, 8, 10] and run.named == [2, 4, 4, 8, 8]
    assert json.loads(run.saved[10])["validation"]["best"] == {"step": 8, "loss": 1.5}
    lines = [line for line in run.out.getvalue().splitlines() if line.startswith("validation")]
    assert lines[0].startswith(
        "validation after step 2: loss 3.0000 (a 3.0000, b 3.0000)  accuracy 75.0 %  bad samples 1"
    )
    assert lines[0].endswith("best so far") and "best" not in lines[2]


@pytest.mark.parametrize("interval", [1, 3, 100])
def test_every_interval_ends_with_the_last_step(simulate: Callable[..., SimulatedRun], interval: int) -> None:
    run = simulate(interval=interval, at_start=True)
    run.train()
    expected = [0, *(step for step in range(1, STEPS) if step % interval == 0), STEPS]
    assert [step for step, _, _ in validated(run)] == expected
    assert list(run.saved)[0] == (expected[1] if interval < 5 else 5), "step 0 cannot be saved as the best"


@pytest.mark.parametrize("checkpoint", [4, 5, 8])
def test_a_resumed_run_has_the_same_record(simulate: Callable[..., SimulatedRun], checkpoint: int) -> None:
    run = simulate(losses=LOSSES)
    run.train()
    record, extras = validated(run), dict(run.saved)
    kept = {step: extra for step, extra in extras.items() if step <= checkpoint}
    resumed = simulate(losses=LOSSES, saved=kept)
    resumed.train(json.loads(extras[checkpoint]))
    assert validated(resumed) == record and resumed.saved.keys() == extras.keys()
    assert resumed.named[0] == json.loads(extras[checkpoint])["validation"]["best"]["step"]


def test_a_stop_during_a_validation_saves_its_step_and_the_next_start_validates(
    simulate: Callable[..., SimulatedRun],
) -> None:
    run = simulate(losses=LOSSES, stop_in=6)
    assert run.train() is False
    assert [step for step, _, _ in validated(run)] == [2, 4] and list(run.saved) == [2, 4, 5, 6]
    resumed = simulate(losses=LOSSES, saved=dict(run.saved))
    assert resumed.train(json.loads(run.saved[6])) is True
    assert validated(resumed) == [
        (2, 3.0, True), (4, 2.0, True), (6, 4.0, False), (8, 1.5, True), (10, 1.8, False),
    ]  # fmt: skip


def test_a_stop_in_the_validation_of_a_start(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(stop_in=6)
    run.train()
    again = simulate(stop_in=6, saved=dict(run.saved))
    assert again.train(json.loads(run.saved[6])) is False and again.state.step == 6


def test_the_best_may_be_found_at_a_start(simulate: Callable[..., SimulatedRun]) -> None:
    losses = LOSSES | {6: 0.5}
    run = simulate(losses=losses, stop_in=6)
    run.train()
    resumed = simulate(losses=losses, saved=dict(run.saved))
    resumed.train(json.loads(run.saved[6]))
    assert resumed.named[:2] == [4, 6], "step 6 has a checkpoint, which best names at once"
    assert (6, 0.5, True) in validated(resumed) and 7 not in resumed.saved


def test_a_rollback_validates_its_steps_again(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses=LOSSES, spikes=(6,), checkpoint_interval=4)
    run.train()
    assert [step for step, _, _ in validated(run)] == [2, 4, 6, 8, 10], "each step once"
    assert json.loads(run.saved[10])["validation"]["best"] == {"step": 8, "loss": 1.5}


def test_losses_of_other_settings_are_not_compared(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses=LOSSES)
    run.train()
    changed = simulate(losses=LOSSES, saved={4: run.saved[4]}, settings="b")
    changed.train(json.loads(run.saved[4]))
    assert (6, 4.0, True) in validated(changed), "the first of the new settings"


def test_a_checkpoint_without_validation_is_validated_where_it_is_due(simulate: Callable[..., SimulatedRun]) -> None:
    run = simulate(losses=LOSSES)
    run.train()
    extra = json.loads(run.saved[4])
    del extra["validation"]
    resumed = simulate(losses=LOSSES, saved={4: json.dumps(extra)})
    resumed.train(extra)
    assert [step for step, _, _ in validated(resumed)] == [2, 4, 6, 8, 10], "the line of step 4 is replaced"


def test_the_watchdog_gives_a_validation_time_and_does_not_count_it_as_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    tracker = ProgressTracker(WatchConfig(step_timeout=60.0, init_timeout=600.0))
    tracker.start(0)
    for step in range(1, 5):
        now[0] += 10
        tracker.finish_step(step)
    tracker.set_phase(VALIDATING)
    now[0] += 500
    assert tracker.timeout == 600 and tracker.elapsed == 500
    tracker.set_phase("validation: forward 0")
    assert tracker.elapsed == 0 and tracker.timeout == 200, "a round that hangs is found as a step that hangs"
    now[0] += 30
    tracker.set_phase(VALIDATING)
    tracker.set_phase("callbacks")
    now[0] += 10
    tracker.finish_step(5)
    assert tracker.step_seconds == 10


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    report = ValidationReport({"a": SourceValidation(math.nan, 0, 0), "b": SourceValidation(2.0, 5, 3, 4, 1)}, 2, 0.5)
    assert report.loss == 2.0 and report.accuracy == 25.0
    assert scalars_of(report) == {
        "validation/loss": 2.0, "validation/accuracy": 25.0, "validation/b/loss": 2.0, "validation/b/accuracy": 25.0,
    }  # fmt: skip
    line = json.loads(json.dumps(line_of(4, report), allow_nan=False))
    assert line["sources"]["a"]["loss"] is None and line["loss"] == 2.0 and line["bad_samples"] == 2
    assert math.isnan(ValidationReport({"a": SourceValidation(math.nan, 0, 0)}, 0, 0.0).loss)


def test_the_mean_is_over_tokens() -> None:
    report = ValidationReport({"a": SourceValidation(1.0, 30, 3), "b": SourceValidation(5.0, 10, 9)}, 0, 0.0)
    assert report.loss == 2.0 and report.supervised_tokens == 40


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = TensorBoardCallback(tmp_path, 1)
    callback.on_start(0)
    callback.on_validation(3, ValidationReport({"a": SourceValidation(1.5, 3, 3)}, 0, 0.0))
    callback.on_end(3)
    events = EventAccumulator(str(tmp_path)).Reload()
    (point,) = events.Scalars("validation/a/loss")
    assert (point.step, point.value) == (3, 1.5)
