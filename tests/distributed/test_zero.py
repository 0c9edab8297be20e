"""ZeRO 1, 2 and 3 over 1, 2 and 4 ranks equal a plain training loop of one process without DeepSpeed."""

import math
from functools import cache

import pytest
import torch
from tiny import (
    MICRO_BATCHES,
    STEPS,
    Setting,
    Trained,
    difference,
    draw_batch,
    outcome,
    rank_batches,
    rate,
    take_steps,
    tiny_engine,
    together,
)
from tiny import reference_training as _reference_training

from aki_megatron.engine.base import MAX_SKIPPED_IN_A_ROW, DivergedError
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Batch, Modality

pytestmark = pytest.mark.distributed
reference_training = cache(_reference_training)


def train(topology: Topology, zero_stage: int, precision: str) -> Trained:
    engine = tiny_engine(topology, Setting(zero_stage=zero_stage, precision=precision))
    return outcome(engine, take_steps(engine, topology, range(STEPS)))


def test_the_steps_compared_are_uneven():
    supervised = [
        [draw_batch(step, number).supervised_tokens for number in range(MICRO_BATCHES)] for step in range(STEPS)
    ]
    assert all(len(set(counts)) > 1 for counts in supervised) and any(0 in counts for counts in supervised)
    for setting in (Setting(), Setting(tied=True)):
        norms = reference_training(setting=setting).norms
        assert max(norms) > setting.max_grad_norm > min(norms), norms


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_equals_the_plain_loop(run_on, record_property, zero_stage, ranks):
    apart = difference(together(run_on(ranks, train, zero_stage, "fp32")), reference_training())
    record_property("largest_difference", apart)
    assert apart <= 1e-5


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_errs_at_most_twice_as_much_as_the_plain_loop_in_bf16(run_on, zero_stage):
    want, plain = reference_training(), reference_training(setting=Setting(precision="bf16"))
    for got in run_on(2, train, zero_stage, "bf16"):
        for part in (lambda trained: trained.losses, lambda trained: trained.norms):
            ours = max(abs(one - other) for one, other in zip(part(got), part(want), strict=True))
            plain_error = max(abs(one - other) for one, other in zip(part(plain), part(want), strict=True))
            assert ours <= 2 * plain_error
        trained_weights = [
            name for name, weight in want.weights.items() if not torch.equal(weight, weight.bfloat16().float())
        ]
        rounded = [
            name for name in trained_weights if torch.equal(got.weights[name], got.weights[name].bfloat16().float())
        ]
        assert not rounded, "master weights or frozen weights were rounded to bf16"


def poisoned(batches: list[Batch]) -> list[Batch]:
    for batch in batches:
        batch.media[Modality.IMAGE].fill_(math.inf)
    return batches


def train_with_one_bad_step(topology: Topology, zero_stage: int, precision: str) -> tuple[Trained, list[bool]]:
    """Step 2 has a gradient that is not finite, on rank 0 alone."""
    engine = tiny_engine(topology, Setting(zero_stage=zero_stage, precision=precision))
    reports = take_steps(engine, topology, [0, 1])
    batches = rank_batches(2, topology.data_rank, topology.data)
    reports.append(engine.train_step(poisoned(batches) if topology.rank == 0 else batches, rate(2)))
    reports += take_steps(engine, topology, [3, 4])
    good = [report for report in reports if not report.skipped]
    return outcome(engine, good), [report.skipped for report in reports]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_all_ranks_skip_a_gradient_that_is_not_finite(run_on, zero_stage):
    without = reference_training((0, 1, 3, 4))
    for got, skipped in run_on(2, train_with_one_bad_step, zero_stage, "fp32"):
        assert skipped == [False, False, True, False, False]
        assert difference(got, without) <= 1e-5


def test_all_ranks_skip_in_bf16_stage_1(run_on):
    """DeepSpeed has a separate optimizer for this case."""
    for got, skipped in run_on(2, train_with_one_bad_step, 1, "bf16"):
        assert skipped == [False, False, True, False, False]
        assert all(weight.isfinite().all() for weight in got.weights.values())


def diverge(topology: Topology) -> int:
    engine = tiny_engine(topology)
    for step in range(MAX_SKIPPED_IN_A_ROW + 1):
        try:
            engine.train_step(poisoned(rank_batches(0, topology.data_rank, topology.data)), 1e-3)
        except DivergedError as error:
            assert "optimizer.lr" in str(error)
            return step
    return -1


def test_training_stops_when_every_step_is_skipped(run_on):
    assert run_on(2, diverge) == [MAX_SKIPPED_IN_A_ROW - 1] * 2


def report_of(topology: Topology):
    return take_steps(tiny_engine(topology), topology, [0])[0]


def test_reported_counts_are_global(run_on):
    whole = [draw_batch(0, number) for number in range(MICRO_BATCHES)]
    for report in run_on(2, report_of):
        assert report.supervised_tokens == sum(batch.supervised_tokens for batch in whole)
        assert report.tokens == sum(int((batch.segment_ids >= 0).sum()) for batch in whole)
        assert report.images == sum(batch.num_items(Modality.IMAGE) for batch in whole)
        assert report.seconds > 0 and report.lr == rate(0)
