"""Tensor x pipeline x data parallelism x ZeRO: every layout equals one process without any of it.

Five optimizer steps with clipping, MMA, packed sequences, ragged lengths, grouped-query heads, unequal token counts,
micro-batches without an image and without a supervised token. Losses, norms and every final weight are compared.
"""

from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
from schedule_helpers import num_buffered, num_in_flight, rank_actions
from tiny import (
    MICRO_BATCHES,
    STEPS,
    Setting,
    Trained,
    difference,
    outcome,
    own_batches,
    rank_batches,
    rate,
    take_steps,
    tiny_engine,
    tiny_model,
    together,
)
from tiny import reference_training as _reference_training

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.engine.mask_consistency import MaskConsistencyChecker, MaskMismatchError
from aki_megatron.parallel.p2p_communication import P2PCommunicator
from aki_megatron.parallel.schedule import build_schedule
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import IGNORE, Modality, StackedIds, StageActivations

pytestmark = pytest.mark.distributed
LIMIT = 1e-5

LAYOUTS: dict[str, tuple[int, int, int, Setting]] = {
    "1 process, ZeRO-0": (1, 1, 1, Setting(zero_stage=0)),
    "DP2, ZeRO-0": (2, 1, 1, Setting(zero_stage=0)),
    "TP2, ZeRO-1": (2, 2, 1, Setting(zero_stage=1)),
    "TP2, ZeRO-3": (2, 2, 1, Setting()),
    "TP4, ZeRO-3": (4, 4, 1, Setting()),
    "PP2, ZeRO-3": (2, 1, 2, Setting()),
    "PP4, ZeRO-3": (4, 1, 4, Setting()),
    "PP2, ZeRO-0": (2, 1, 2, Setting(zero_stage=0)),
    "PP2, layers 1 + 3": (2, 1, 2, Setting(layers_per_stage=(1, 3))),
    "TP2 x PP2, ZeRO-3": (4, 2, 2, Setting()),
    "TP2 x PP2 x DP2, ZeRO-0": (8, 2, 2, Setting(zero_stage=0)),
    "TP2 x DP2, ZeRO-3": (4, 2, 1, Setting()),
    "PP2 x DP2, ZeRO-1": (4, 1, 2, Setting(zero_stage=1)),
    "PP2 x DP2, ZeRO-2": (4, 1, 2, Setting(zero_stage=2)),
    "PP2 x DP2, ZeRO-3": (4, 1, 2, Setting()),
    "TP2 x PP2 x DP2, ZeRO-1": (8, 2, 2, Setting(zero_stage=1)),
    "TP2 x PP2 x DP2, ZeRO-2": (8, 2, 2, Setting(zero_stage=2)),
    "TP2 x PP2 x DP2, ZeRO-3": (8, 2, 2, Setting()),
    "TP4 x PP2, ZeRO-3": (8, 4, 2, Setting()),
    "PP2 x 2 virtual stages, ZeRO-3": (2, 1, 2, Setting(virtual_stages=2)),
    "PP2 x 2 virtual stages x DP2, ZeRO-2": (4, 1, 2, Setting(virtual_stages=2, zero_stage=2)),
    "TP2 x PP2 x 2 virtual stages x DP2, ZeRO-3": (8, 2, 2, Setting(virtual_stages=2)),
    "PP2 x DP2, ZeRO-3, recompute": (4, 1, 2, Setting(recompute=True)),
    "TP2 x PP2 x DP2, ZeRO-3, recompute": (8, 2, 2, Setting(recompute=True)),
    "TP2 x DP2, ZeRO-2, optimizer in host memory": (4, 2, 1, Setting(zero_stage=2, offload=True)),
    "PP2, causal": (2, 1, 2, Setting(rule="causal")),
}
"""Name -> ranks, tensor, pipeline, setting. test_zero.py has more layouts of data ranks alone."""

TIED = ("TP2, ZeRO-3", "PP2, ZeRO-3", "PP4, ZeRO-3", "PP2 x DP2, ZeRO-1", "PP2 x DP2, ZeRO-2", "PP2 x DP2, ZeRO-3",
        "TP2 x PP2 x DP2, ZeRO-0", "TP2 x PP2 x DP2, ZeRO-3", "TP2 x PP2 x 2 virtual stages x DP2, ZeRO-3")  # fmt: skip
"""Layouts that are run with tied embeddings as well."""

CASES = [pytest.param(*layout, id=name) for name, layout in LAYOUTS.items()]
CASES += [pytest.param(*LAYOUTS[n][:3], replace(LAYOUTS[n][3], tied=True), id=f"{n}, tied") for n in TIED]


@cache
def plain(tied: bool = False, rule: str = "mma") -> Trained:
    return _reference_training(setting=Setting(tied=tied, rule=rule))


def train(topology: Topology, setting: Setting) -> Trained:
    engine = tiny_engine(topology, setting)
    return outcome(engine, take_steps(engine, topology, range(STEPS)))


def expected(setting: Setting) -> Trained:
    return plain(setting.tied, setting.rule)


@pytest.mark.parametrize(("ranks", "tensor", "pipeline", "setting"), CASES)
def test_every_layout_equals_one_process(run_on, record_property, ranks, tensor, pipeline, setting):
    got = together(run_on(ranks, train, setting, tensor=tensor, pipeline=pipeline))
    apart = difference(got, expected(setting))
    record_property("largest_difference", apart)
    assert apart <= LIMIT


def test_the_samples_tell_the_rules_apart():
    """Otherwise equality would prove nothing about the mask."""
    assert difference(plain(rule="causal"), plain()) > 1e-2
    packed = [batch for batch in rank_batches(0, 0, 1) if int(batch.segment_ids.max()) > 0]
    widths = {batch.token_ids.shape[1] for batch in rank_batches(0, 0, 1)}
    assert packed and len(widths) > 2


COLUMNS = ("modality", "segment", "position", "target")
FAULTS = ("causal on one stage", "mixed on one stage", "causal on one tensor rank", *COLUMNS, "all ids")


def corrupt(ids: StackedIds, fault: str) -> None:
    """Zero one kind of ids or all of them in place, as faulty communication would."""
    if fault == "all ids":
        ids.stacked.zero_()
    elif fault == "target":  # only where there is one: a target at every position would fail the leak check
        ids.targets[ids.targets != IGNORE] = 0
    elif fault in COLUMNS:
        getattr(ids, f"{fault}_ids").zero_()


def train_wrongly(topology: Topology, fault: str, compare: bool) -> tuple[str, list[float], dict[str, torch.Tensor]]:
    """Train with another rule on one rank, or with corrupted ids: return the error, the losses, the weights."""
    engine = tiny_engine(topology)
    if topology.tensor_rank == 1 if "tensor" in fault else topology.pipeline_rank == 1:
        for stage in engine._stages:
            if " on " in fault:
                stage.module.attention = AttentionConfig(rule=fault.split()[0])
    wait_activations = P2PCommunicator.wait_activations

    def corrupted(self: P2PCommunicator, message: Any) -> StageActivations:
        activations = wait_activations(self, message)
        corrupt(activations.ids, fault)
        return activations

    compared = MaskConsistencyChecker.compare if compare else lambda self: None
    losses, found = [], ""
    with (
        patch.object(P2PCommunicator, "wait_activations", corrupted),
        patch.object(MaskConsistencyChecker, "compare", compared),
    ):
        try:
            losses = [report.loss for report in take_steps(engine, topology, range(2))]
        except MaskMismatchError as error:
            found = str(error)
    return found, losses, {name: weight.clone() for name, weight in engine.named_weights()}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_mask_is_seen_by_the_digest(run_on, fault):
    initial = dict(tiny_model().named_parameters())
    wrong = {1, 3} if "tensor" in fault else {2, 3}
    for found, _, weights in run_on(4, train_wrongly, fault, True, tensor=2, pipeline=2):
        assert "different attention masks" in found
        groups = [{rank for rank in range(4) if f"rank {rank} (" in group} for group in found.split("differs from")]
        assert sorted(groups, key=sorted) == sorted([wrong, set(range(4)) - wrong], key=sorted)
        assert all(torch.equal(weight, initial[name]) for name, weight in weights.items()), "found before the update"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_mask_is_seen_by_equality(run_on, fault):
    """Without the comparison of digests the losses show the mistake."""
    for found, losses, _ in run_on(4, train_wrongly, fault, False, tensor=2, pipeline=2):
        apart = max(abs(one - other) for one, other in zip(losses, plain().losses, strict=False))
        assert not found and len(losses) == 2 and apart > 10 * LIMIT


def train_with_a_rule_that_changes_later(topology: Topology) -> list[int]:
    """Change the rule of one stage after two steps; comparing in every third step finds it in the fourth."""
    engine = tiny_engine(topology, Setting(mask_check_interval=3))
    done = []
    for step in range(STEPS):
        if step == 2 and topology.pipeline_rank == 1:
            engine._stages[0].module.attention = AttentionConfig(rule="causal")
        try:
            take_steps(engine, topology, [step])
        except MaskMismatchError:
            break
        done.append(step)
    return done


def test_masks_are_compared_at_the_start_and_every_few_steps(run_on):
    assert run_on(2, train_with_a_rule_that_changes_later, pipeline=2) == [[0, 1, 2]] * 2


class _Counter:
    """Count what a rank holds during its steps: forward passes in flight, and messages received but not yet used."""

    def __init__(self) -> None:
        self.in_flight = self.buffered = 0
        self.max_in_flight = self.max_buffered = 0

    def patches(self, stage_type: type) -> list[Any]:
        return [
            self._patch(stage_type, "forward", in_flight=1),
            self._patch(stage_type, "backward", in_flight=-1),
            self._patch(P2PCommunicator, "wait_activations", buffered=-1),
            self._patch(P2PCommunicator, "wait_gradient", buffered=-1),
            self._patch(P2PCommunicator, "exchange", buffered=None),
        ]

    def _patch(self, owner: type, name: str, *, in_flight: int = 0, buffered: int | None = 0) -> Any:
        original = getattr(owner, name)

        def call(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.in_flight += in_flight
            self.buffered += len(args[1]) if buffered is None else buffered
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            self.max_buffered = max(self.max_buffered, self.buffered)
            return original(this, *args, **kwargs)

        return patch.object(owner, name, call)


def train_and_count(topology: Topology, setting: Setting) -> tuple[dict[str, int], int, int, int]:
    """Collectives of DeepSpeed in one step, the most in flight and buffered, and the number of stages of this rank."""
    from collections import Counter

    from deepspeed.comm.torch import TorchBackend

    engine = tiny_engine(topology, setting)
    take_steps(engine, topology, [0])
    counts: Counter[str] = Counter()

    def counting(name: str) -> Any:
        original = getattr(TorchBackend, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(self, *args, **kwargs)

        return patch.object(TorchBackend, name, call)

    names = ["all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast", "all_gather", "reduce"]
    counter = _Counter()
    with ExitStack() as stack:
        for each in [*map(counting, names), *counter.patches(type(engine._stages[0]))]:
            stack.enter_context(each)
        take_steps(engine, topology, [1])
    return dict(counts), counter.max_in_flight, counter.max_buffered, len(engine._stages)


@pytest.mark.parametrize(("pipeline", "data", "virtual_stages"), [(1, 2, 1), (2, 2, 1), (4, 1, 1), (2, 2, 2)])
def test_collectives_and_memory_bounds(run_on, pipeline, data, virtual_stages):
    """ZeRO-3 gathers each parameter once per step, however many micro-batches; memory stays within the schedule's."""
    sizes = {
        "pipeline": pipeline,
        "virtual_stages": virtual_stages,
        "num_microbatches": MICRO_BATCHES // data,
    }
    schedules = build_schedule(**sizes)
    answers = run_on(pipeline * data, train_and_count, Setting(virtual_stages=virtual_stages), pipeline=pipeline)
    for rank, (counts, in_flight, buffered, num_stages) in enumerate(answers):
        pipeline_rank = rank // data
        # every stage gathers all its parameters at once, and reduces its gradients once per micro-batch
        gathers = {"all_gather_into_tensor": num_stages} if data > 1 else {}  # a single data rank has them
        assert counts == gathers | {"reduce_scatter_tensor": num_stages * sizes["num_microbatches"]}
        assert in_flight == num_in_flight(rank_actions(pipeline_rank, **sizes))
        assert buffered == num_buffered(schedules[pipeline_rank])
        if virtual_stages == 1:
            assert in_flight == min(pipeline - pipeline_rank, sizes["num_microbatches"])


class _SavedActivation:
    """A saved activation, counted as long as the graph holds it."""

    current = peak = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
        _SavedActivation.current += self.size
        _SavedActivation.peak = max(_SavedActivation.peak, _SavedActivation.current)

    def __del__(self) -> None:
        _SavedActivation.current -= self.size


def measure_activations(topology: Topology) -> tuple[int, int]:
    """Most bytes of saved activations in a step of equal micro-batches, and what one forward pass saves."""
    engine = tiny_engine(topology, Setting())
    batches = [rank_batches(0, 0, 1)[0]] * MICRO_BATCHES if topology.reads_data else []
    callbacks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor if tensor.is_leaf else _SavedActivation(tensor),
        lambda saved: saved.tensor if isinstance(saved, _SavedActivation) else saved,
    )
    _SavedActivation.current = _SavedActivation.peak = 0
    firsts: list[int] = []
    forward = type(engine._stages[0]).forward

    def measured(self: Any, *args: Any) -> torch.Tensor:
        before = _SavedActivation.current
        output = forward(self, *args)
        firsts.append(_SavedActivation.current - before)
        return output

    with callbacks, patch.object(type(engine._stages[0]), "forward", measured):
        engine.train_step(batches, rate(0))
    return _SavedActivation.peak, max(firsts)


def test_saved_activations_stay_within_the_in_flight_limit(run_on):
    for rank, (peak, one) in enumerate(run_on(4, measure_activations, pipeline=4)):
        assert one > 0
        # the loss's scaling and the backward pass itself save a little besides
        assert (4 - rank) * one <= peak <= (4 - rank) * one + 0.05 * one


def poisoned_steps(topology: Topology, setting: Setting) -> tuple[Trained, list[bool]]:
    """Step 2 has a gradient that is not finite, on one data rank alone."""
    engine = tiny_engine(topology, setting)
    reports = take_steps(engine, topology, [0, 1])
    batches = own_batches(2, topology)
    if topology.data_rank == topology.data - 1:
        for batch in batches:
            batch.media[Modality.IMAGE].fill_(float("inf"))
    reports.append(engine.train_step(batches, rate(2)))
    reports += take_steps(engine, topology, [3, 4])
    good = [report for report in reports if not report.skipped]
    return outcome(engine, good), [report.skipped for report in reports]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_all_ranks_skip_together(run_on, zero_stage):
    answers = run_on(8, poisoned_steps, Setting(zero_stage=zero_stage), tensor=2, pipeline=2)
    assert {tuple(skipped) for _, skipped in answers} == {(False, False, True, False, False)}
    got = together([trained for trained, _ in answers])
    assert difference(got, _reference_training((0, 1, 3, 4))) <= LIMIT


def text_only(topology: Topology) -> Trained:
    """No image in the whole step, on any rank; and a step in which one data rank has no supervised token."""
    engine = tiny_engine(topology, Setting())
    reports = []
    for number in (1, 2):  # the second kind of micro-batch has no image, the third of odd steps no supervised token
        batches = [rank_batches(1, 0, 1)[number]] * (MICRO_BATCHES // topology.data) if topology.reads_data else []
        if topology.data_rank == 0 and number == 2 and batches:
            batches = [rank_batches(1, 0, 1)[0]] * len(batches)
        reports.append(engine.train_step(batches, 1e-3))
    return outcome(engine, reports)


def test_steps_without_images_and_ranks_without_supervision_do_not_hang(run_on):
    got = together(run_on(4, text_only, tensor=1, pipeline=2))
    alone = together(run_on(2, text_only, tensor=1, pipeline=1))
    assert difference(got, alone) <= LIMIT
    assert all(0 < loss < 10 for loss in got.losses)
    images = [batch for batch in rank_batches(1, 0, 1)[1:2] if (batch.modality_ids == Modality.IMAGE).any()]
    assert not images and rank_batches(1, 0, 1)[2].supervised_tokens == 0
