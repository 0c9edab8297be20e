"""LossSpikeGuard: which steps it refuses, when it rolls back, when it ends a run, and that its state is complete."""

import json
import math
from collections.abc import Sequence

import pytest
from step_reports import step_report

from aki_megatron.config.run import WatchConfig
from aki_megatron.supervise import loss_spikes
from aki_megatron.supervise.loss_spikes import LossSpikeAction, LossSpikeError, LossSpikeGuard
from aki_megatron.types import StepReport

WINDOW = 4
SPIKE = (9.0, 1.0)
"""Loss and gradient norm; the loss is more than four times the typical 2."""


def report(loss: float, norm: float) -> StepReport:
    return step_report(loss, grad_norm=norm)


def watch(**changes: object) -> WatchConfig:
    return WatchConfig(**({"on_loss_spike": "skip", "loss_spike_window": WINDOW, "max_rollbacks": 2} | changes))  # type: ignore[arg-type]


def guard_after(
    steps: Sequence[tuple[float, float]], config: WatchConfig
) -> tuple[LossSpikeGuard, list[tuple[int, str, str]]]:
    """A guard that has seen steps, and the events it recorded."""
    events: list[tuple[int, str, str]] = []
    guard = LossSpikeGuard(config, record_event=lambda *event: events.append(event))
    for step, (loss, norm) in enumerate(steps, 1):
        assert guard.on_step(step, report(loss, norm)) is LossSpikeAction.CONTINUE
    return guard, events


TYPICAL = [(2.0, 1.0), (2.1, 1.1), (1.9, 0.9), (2.0, 1.0)]


@pytest.mark.parametrize(
    ("loss", "norm", "accepted"),
    [(2.0, 1.0, True), (7.9, 3.9, True), (8.1, 1.0, False), (2.0, 4.1, False), (0.0, 0.0, True)],
)
def test_a_loss_or_norm_above_a_multiple_of_the_median_is_a_spike(loss: float, norm: float, accepted: bool) -> None:
    guard, _ = guard_after(TYPICAL, watch())
    assert guard.should_step(loss, norm) is accepted


def test_no_step_is_a_spike_before_the_window_is_full_or_where_the_policy_is_off() -> None:
    assert guard_after(TYPICAL[:-1], watch())[0].should_step(*SPIKE)
    assert guard_after(TYPICAL, watch(on_loss_spike="off"))[0].should_step(*SPIKE)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.inf), (2.0, math.nan)])
def test_non_finite_values_are_refused_from_the_first_step_on(loss: float, norm: float) -> None:
    guard, events = guard_after([], watch(on_loss_spike="off"))
    assert not guard.should_step(loss, norm)
    assert guard.on_step(1, report(loss, norm)) is LossSpikeAction.CONTINUE
    assert [event[:2] for event in events] == [(1, "non_finite")]


def test_a_refused_step_is_recorded_and_does_not_enter_the_median() -> None:
    guard, events = guard_after([*TYPICAL, SPIKE, SPIKE, SPIKE], watch())
    assert [(step, kind) for step, kind, _ in events] == [(5, "loss_spike"), (6, "loss_spike"), (7, "loss_spike")]
    assert events[0][2] == "the loss 9 is 4.5 times the median of the last 4 steps, 2; policy: skip"
    assert not guard.should_step(*SPIKE), "the median does not hold the spikes"


@pytest.mark.parametrize("kind", ["loss_spike", "non_finite"])
def test_policy_stop_ends_the_run_and_says_what_to_change(kind: str) -> None:
    guard, events = guard_after(TYPICAL, watch(**{f"on_{kind}": "stop"}))
    with pytest.raises(LossSpikeError, match=rf"Step 5: .*watch.on_{kind} is stop.*--watch.on_{kind} rollback"):
        guard.on_step(5, report(*SPIKE) if kind == "loss_spike" else report(math.nan, 1.0))
    assert events[-1][1] == kind


def test_a_level_shift_ends_the_run() -> None:
    guard, _ = guard_after([*TYPICAL, *[SPIKE] * (loss_spikes.MAX_CONSECUTIVE_SPIKES - 1)], watch())
    with pytest.raises(LossSpikeError, match="10 steps in a row.*level shift"):
        guard.on_step(99, report(*SPIKE))


def test_a_good_step_resets_the_count_of_consecutive_spikes() -> None:
    spikes = [SPIKE] * (loss_spikes.MAX_CONSECUTIVE_SPIKES - 1)
    guard_after([*TYPICAL, *spikes, TYPICAL[0], *spikes], watch())


def test_the_number_of_rollbacks_to_one_checkpoint_is_limited() -> None:
    guard, events = guard_after(TYPICAL, watch(on_loss_spike="rollback"))
    saved = guard.state_dict()
    for number in (1, 2):
        assert guard.on_step(5, report(*SPIKE)) is LossSpikeAction.ROLLBACK
        guard.on_rollback(4, saved)
        assert events[-1] == (5, "rollback", f"to the checkpoint of step 4, skipping the data of the steps since; "
                             f"{number} of 2")  # fmt: skip
    assert guard.on_step(5, report(*SPIKE)) is LossSpikeAction.ROLLBACK
    with pytest.raises(LossSpikeError, match="checkpoint of step 4 2 times already.*max_rollbacks=2"):
        guard.on_rollback(4, saved)


def test_rollbacks_to_another_checkpoint_are_counted_from_one() -> None:
    guard, _ = guard_after(TYPICAL, watch(on_loss_spike="rollback"))
    for checkpoint in (4, 4, 8, 8, 12):
        guard.on_rollback(checkpoint, guard.state_dict())


def test_a_rollback_restores_the_window_of_the_checkpoint() -> None:
    guard, _ = guard_after(TYPICAL[:2], watch(on_loss_spike="rollback"))
    saved = guard.state_dict()
    for step, numbers in enumerate(TYPICAL[2:], 3):
        guard.on_step(step, report(*numbers))
    assert not guard.should_step(*SPIKE)
    guard.on_rollback(2, saved)
    assert guard.state_dict() == saved and guard.should_step(*SPIKE)


def test_a_guard_with_the_state_of_another_decides_alike() -> None:
    steps = [(2.0 + 0.1 * (step % 5), 1.0 / (1 + step % 3)) for step in range(40)]
    steps[20] = steps[33] = SPIKE
    steps[27] = (math.nan, 1.0)
    uninterrupted, events = guard_after(steps, watch(loss_spike_window=16))
    first, before = guard_after(steps[:25], watch(loss_spike_window=16))
    resumed = LossSpikeGuard(
        watch(loss_spike_window=16),
        json.loads(json.dumps(first.state_dict())),
        record_event=lambda *e: before.append(e),
    )
    for step, numbers in enumerate(steps[25:], 26):
        resumed.on_step(step, report(*numbers))
    assert before == events and [event[0] for event in events] == [21, 28, 34]
    assert resumed.state_dict() == uninterrupted.state_dict()
    fresh = LossSpikeGuard(watch(loss_spike_window=16))
    assert fresh.should_step(*SPIKE) and not resumed.should_step(*SPIKE), "the state is what makes the difference"
