"""What ranks agree on in a step: whether the update is applied, and the control requests."""

import math
from dataclasses import dataclass

import pytest
from tiny import (
    MICRO_BATCHES,
    STEPS,
    Setting,
    Trained,
    difference,
    outcome,
    own_batches,
    rate,
    reference_training,
    take_steps,
    tiny_engine,
    together,
)

from aki_megatron.types import ControlRequest, Modality

pytestmark = pytest.mark.distributed
LIMIT = 1e-5
REFUSED = 2

REQUESTS = (
    {3: ControlRequest.STOP},
    {0: ControlRequest.SAVE, 2: ControlRequest.STOP},
    {},
    {1: ControlRequest.SAVE, 2: ControlRequest.SAVE},
    {},
)
"""Of each step: rank -> its control request."""

ALL = [
    ControlRequest.STOP,
    ControlRequest.SAVE | ControlRequest.STOP,
    ControlRequest.NONE,
    ControlRequest.SAVE,
    ControlRequest.NONE,
]


@dataclass
class Seen:
    """Of one rank."""

    trained: Trained
    skipped: list[bool]
    control: list[ControlRequest]
    asked: list[tuple[float, float]]
    """Loss and norm of every step whose update was asked about."""
    phases: list[str]


def steps_with_a_refusal(topology) -> Seen:
    asked: list[tuple[float, float]] = []
    phases: list[str] = []

    def should_apply_update(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return len(asked) - 1 != REFUSED

    engine = tiny_engine(topology, Setting(), should_apply_update=should_apply_update, set_phase=phases.append)
    reports = []
    for step, requests in enumerate(REQUESTS):
        control = requests.get(topology.rank, ControlRequest.NONE)
        reports.append(engine.train_step(own_batches(step, topology), rate(step), control=control))
    good = [report for report in reports if not report.skipped]
    batches = own_batches(0, topology)
    for batch in batches:
        batch.media[Modality.IMAGE].fill_(math.inf)
    control = ControlRequest.STOP if topology.rank == 1 else ControlRequest.NONE
    reports.append(engine.train_step(batches, rate(STEPS), control=control))
    skipped, combined = [report.skipped for report in reports], [report.control for report in reports]
    return Seen(outcome(engine, good), skipped, combined, asked, phases)


def test_a_refused_step_and_control_requests_are_the_same_on_all_ranks(run_on):
    answers = run_on(4, steps_with_a_refusal, tensor=2, pipeline=2)
    without = reference_training([step for step in range(STEPS) if step != REFUSED])
    got = together([seen.trained for seen in answers])
    assert difference(got, without) <= LIMIT
    with_it = reference_training().weights
    assert max(float((got.weights[name] - with_it[name]).abs().max()) for name in with_it) > 100 * LIMIT
    for seen in answers:
        assert seen.skipped == [step == REFUSED for step in range(STEPS)] + [True]
        assert seen.control == [*ALL, ControlRequest.STOP], "a loss that is not finite must not lose a request"
        assert seen.asked == answers[0].asked and len(seen.asked) == STEPS, "what is not finite is not asked about"
        for phase in (
            "reducing gradients",
            "optimizer step",
            *(f"{kind} {MICRO_BATCHES - 1}" for kind in ("forward", "backward")),
        ):
            assert seen.phases.count(phase) == STEPS + 1, phase
        assert (
            seen.phases.index("forward 0") < seen.phases.index("backward 0") < seen.phases.index("reducing gradients")
        )


def diverging_steps(topology) -> list[bool]:
    """Nine steps that are not finite, a state that is loaded, nine more: no ten in a row."""
    engine = tiny_engine(topology, Setting(zero_stage=0))
    state = engine.state_dict()
    reports = []
    for _ in range(2):
        for _ in range(9):
            batches = own_batches(0, topology)
            for batch in batches:
                batch.media[Modality.IMAGE].fill_(math.inf)
            reports.append(engine.train_step(batches, 1e-3))
        engine.load_state_dict(state)
    return [report.skipped for report in reports + take_steps(engine, topology, [0])]


def test_steps_before_a_state_is_loaded_do_not_count_as_divergence(run_on):
    assert run_on(1, diverging_steps) == [[True] * 18 + [False]]
