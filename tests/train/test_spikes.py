"""The judge: what it refuses, when it goes back, when it ends a run, and that its state is all it needs."""

import json
import math
from collections.abc import Sequence

import pytest

from aki_megatron.config.run import WatchConfig
from aki_megatron.supervise import loss_spikes
from aki_megatron.supervise.loss_spikes import LossSpikeGuard, SpikeError, Verdict
from aki_megatron.types import StepReport

WINDOW = 4
SPIKE = (9.0, 1.0)
"""Loss and gradient norm; the loss is more than four times the usual 2."""


def report(loss: float, norm: float) -> StepReport:
    numbers = {"supervised_tokens": 1, "tokens": 1, "places": 1, "images": 0, "bad_samples": 0}
    return StepReport(loss=loss, grad_norm=norm, lr=0.1, seconds=0.1, skipped=False, **numbers)


def watch(**changes: object) -> WatchConfig:
    return WatchConfig(**({"on_loss_spike": "skip", "loss_spike_window": WINDOW, "max_rollbacks": 2} | changes))  # type: ignore[arg-type]


def judge_after(
    steps: Sequence[tuple[float, float]], config: WatchConfig
) -> tuple[LossSpikeGuard, list[tuple[int, str, str]]]:
    """A judge that has seen steps, and the events it noted."""
    noted: list[tuple[int, str, str]] = []
    judge = LossSpikeGuard(config, note=lambda *event: noted.append(event))
    for step, (loss, norm) in enumerate(steps, 1):
        assert judge.after(step, report(loss, norm)) is Verdict.GO_ON
    return judge, noted


USUAL = [(2.0, 1.0), (2.1, 1.1), (1.9, 0.9), (2.0, 1.0)]


@pytest.mark.parametrize(
    ("loss", "norm", "accepted"),
    [(2.0, 1.0, True), (7.9, 3.9, True), (8.1, 1.0, False), (2.0, 4.1, False), (0.0, 0.0, True)],
)
def test_a_spike_is_a_loss_or_a_norm_above_a_multiple_of_the_median(loss: float, norm: float, accepted: bool) -> None:
    judge, _ = judge_after(USUAL, watch())
    assert judge.accept(loss, norm) is accepted


def test_nothing_is_a_spike_before_the_window_is_full_or_where_spikes_are_off() -> None:
    assert judge_after(USUAL[:-1], watch())[0].accept(*SPIKE)
    assert judge_after(USUAL, watch(on_loss_spike="off"))[0].accept(*SPIKE)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.inf), (2.0, math.nan)])
def test_what_is_not_finite_is_refused_from_the_first_step_on(loss: float, norm: float) -> None:
    judge, noted = judge_after([], watch(on_loss_spike="off"))
    assert not judge.accept(loss, norm)
    assert judge.after(1, report(loss, norm)) is Verdict.GO_ON
    assert [event[:2] for event in noted] == [(1, "non_finite")]


def test_a_refused_step_is_noted_and_leaves_the_median_alone() -> None:
    judge, noted = judge_after([*USUAL, SPIKE, SPIKE, SPIKE], watch())
    assert [(step, kind) for step, kind, _ in noted] == [(5, "spike"), (6, "spike"), (7, "spike")]
    assert noted[0][2] == "the loss 9 is 4.5 times the median of the last 4 steps, 2; policy: skip"
    assert not judge.accept(*SPIKE), "the median has not learnt the spikes"


@pytest.mark.parametrize("kind", ["spike", "non_finite"])
def test_the_policy_stop_ends_the_run_and_says_what_to_do(kind: str) -> None:
    judge, noted = judge_after(USUAL, watch(**{kind: "stop"}))
    with pytest.raises(SpikeError, match=rf"Step 5: .*watch.{kind} is stop.*--watch.{kind} rollback"):
        judge.after(5, report(*SPIKE) if kind == "spike" else report(math.nan, 1.0))
    assert noted[-1][1] == kind


def test_a_new_level_is_no_spike() -> None:
    judge, _ = judge_after([*USUAL, *[SPIKE] * (loss_spikes.MOST_SPIKES_IN_A_ROW - 1)], watch())
    with pytest.raises(SpikeError, match="10 steps in a row.*new level"):
        judge.after(99, report(*SPIKE))


def test_a_good_step_ends_a_row_of_spikes() -> None:
    row = [SPIKE] * (loss_spikes.MOST_SPIKES_IN_A_ROW - 1)
    judge_after([*USUAL, *row, USUAL[0], *row], watch())


def test_a_run_goes_back_so_often_and_no_more() -> None:
    judge, noted = judge_after(USUAL, watch(on_loss_spike="rollback"))
    saved = judge.state()
    for number in (1, 2):
        assert judge.after(5, report(*SPIKE)) is Verdict.ROLL_BACK
        judge.rewind(4, saved)
        assert noted[-1] == (5, "rollback", f"back to the checkpoint of step 4, without the data of the steps since; "
                             f"{number} of 2")  # fmt: skip
    assert judge.after(5, report(*SPIKE)) is Verdict.ROLL_BACK
    with pytest.raises(SpikeError, match="checkpoint of step 4 2 times already.*max_rollbacks=2"):
        judge.rewind(4, saved)


def test_rollbacks_to_another_checkpoint_count_anew() -> None:
    judge, _ = judge_after(USUAL, watch(on_loss_spike="rollback"))
    for checkpoint in (4, 4, 8, 8, 12):
        judge.rewind(checkpoint, judge.state())


def test_going_back_forgets_the_steps_since() -> None:
    judge, _ = judge_after(USUAL[:2], watch(on_loss_spike="rollback"))
    saved = judge.state()
    for step, numbers in enumerate(USUAL[2:], 3):
        judge.after(step, report(*numbers))
    assert not judge.accept(*SPIKE)
    judge.rewind(2, saved)
    assert judge.state() == saved and judge.accept(*SPIKE)


def test_a_judge_with_the_state_of_another_judges_alike() -> None:
    steps = [(2.0 + 0.1 * (step % 5), 1.0 / (1 + step % 3)) for step in range(40)]
    steps[20] = steps[33] = SPIKE
    steps[27] = (math.nan, 1.0)
    whole, noted = judge_after(steps, watch(loss_spike_window=16))
    first, before = judge_after(steps[:25], watch(loss_spike_window=16))
    resumed = LossSpikeGuard(
        watch(loss_spike_window=16), json.loads(json.dumps(first.state())), note=lambda *e: before.append(e)
    )
    for step, numbers in enumerate(steps[25:], 26):
        resumed.after(step, report(*numbers))
    assert before == noted and [event[0] for event in noted] == [21, 28, 34]
    assert resumed.state() == whole.state()
    fresh = LossSpikeGuard(watch(loss_spike_window=16))
    assert fresh.accept(*SPIKE) and not resumed.accept(*SPIKE), "the state is what makes the difference"
