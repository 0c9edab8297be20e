"""What ranks agree on in a step: whether the optimizer moves, and what they want done afterwards."""

import math
from dataclasses import dataclass

import pytest
from tiny import (
    MICROBATCHES,
    STEPS,
    Setting,
    Trained,
    difference,
    outcome,
    own_share,
    rate,
    take_steps,
    tiny_engine,
    together,
    train_plainly,
)

from aki_megatron.types import ControlRequest

pytestmark = pytest.mark.distributed
LIMIT = 1e-5
REFUSED = 2

WISHES = (
    {3: ControlRequest.STOP},
    {0: ControlRequest.SAVE, 2: ControlRequest.STOP},
    {},
    {1: ControlRequest.SAVE, 2: ControlRequest.SAVE},
    {},
)
"""Of each step: rank -> its wish."""

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
    control_signals: list[ControlRequest]
    asked: list[tuple[float, float]]
    """Loss and norm of every step whose update was asked about."""
    places: list[str]


def steps_with_a_refusal(topology) -> Seen:
    asked: list[tuple[float, float]] = []
    places: list[str] = []

    def accept(loss: float, norm: float) -> bool:
        asked.append((loss, norm))
        return len(asked) - 1 != REFUSED

    engine = tiny_engine(topology, Setting(), accept=accept, at=places.append)
    reports = []
    for step, control_signals in enumerate(WISHES):
        wish = control_signals.get(topology.rank, ControlRequest.NONE)
        reports.append(engine.train_step(own_share(step, topology), rate(step), wish=wish))
    good = [report for report in reports if not report.skipped]
    batches = own_share(0, topology)
    for batch in batches:
        batch.pixels.fill_(math.inf)
    wish = ControlRequest.STOP if topology.rank == 1 else ControlRequest.NONE
    reports.append(engine.train_step(batches, rate(STEPS), wish=wish))
    skipped, control_signals = [report.skipped for report in reports], [report.wish for report in reports]
    return Seen(outcome(engine, good), skipped, control_signals, asked, places)


def test_a_refused_step_and_wishes_are_the_same_everywhere(run_on):
    answers = run_on(4, steps_with_a_refusal, tensor=2, pipeline=2)
    without = train_plainly([step for step in range(STEPS) if step != REFUSED])
    got = together([seen.trained for seen in answers])
    assert difference(got, without) <= LIMIT
    with_it = train_plainly().weights
    assert max(float((got.weights[name] - with_it[name]).abs().max()) for name in with_it) > 100 * LIMIT
    for seen in answers:
        assert seen.skipped == [step == REFUSED for step in range(STEPS)] + [True]
        assert seen.control_signals == [*ALL, ControlRequest.STOP], "a loss that is not finite drowns no wish"
        assert seen.asked == answers[0].asked and len(seen.asked) == STEPS, "what is not finite is not asked about"
        for place in ("reduces", "updates", *(f"{kind} {MICROBATCHES - 1}" for kind in ("forward", "backward"))):
            assert seen.places.count(place) == STEPS + 1, place
        assert seen.places.index("forward 0") < seen.places.index("backward 0") < seen.places.index("reduces")


def diverging_steps(topology) -> list[bool]:
    """Nine steps that are not finite, a state that is loaded, nine more: no ten in a row."""
    engine = tiny_engine(topology, Setting(zero_stage=0))
    state = engine.state()
    reports = []
    for _ in range(2):
        for _ in range(9):
            batches = own_share(0, topology)
            for batch in batches:
                batch.pixels.fill_(math.inf)
            reports.append(engine.train_step(batches, 1e-3))
        engine.load_state(state)
    return [report.skipped for report in reports + take_steps(engine, topology, [0])]


def test_steps_before_a_state_is_loaded_do_not_count_as_divergence(run_on):
    assert run_on(1, diverging_steps) == [[True] * 18 + [False]]
