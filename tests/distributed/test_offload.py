"""With master weights, moments and gradients in host memory, ZeRO 2 and 3 still equal the reference training."""

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny import (
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
    tiny_stages,
    together,
)
from tiny import reference_training as _reference_training

from aki_megatron.engine import global_state
from aki_megatron.engine.optimizer import adamw
from aki_megatron.engine.pipeline import PipelineEngine
from aki_megatron.engine.zero_stage import ZeroStage
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Modality, StepReport, stack_ids

pytestmark = pytest.mark.distributed
reference_training = cache(_reference_training)
SETTINGS = [Setting(zero_stage=2, offload=True), Setting(zero_stage=3, offload=True)]
SUB_GROUPS = replace(SETTINGS[1], zero_settings=(("sub_group_size", 700), ("reduce_bucket_size", 700)))
"""Groups in several parts, gradients in several reductions."""


def train(topology: Topology, setting: Setting) -> Trained:
    engine = tiny_engine(topology, setting)
    return outcome(engine, take_steps(engine, topology, range(STEPS)))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("setting", [*SETTINGS, SUB_GROUPS])
def test_offloaded_training_equals_the_plain_loop(run_on, record_property, setting, ranks):
    apart = difference(together(run_on(ranks, train, setting)), reference_training())
    record_property("largest_difference", apart)
    assert apart <= 1e-5


@pytest.mark.parametrize("setting", SETTINGS)
def test_offloaded_training_in_bf16_equals_training_on_the_device(run_on, setting):
    setting = replace(setting, precision="bf16")
    on_device = together(run_on(2, train, replace(setting, offload=False)))
    assert difference(together(run_on(2, train, setting)), on_device) <= 1e-5


def poisoned_step(engine: PipelineEngine, topology: Topology, step: int) -> StepReport:
    """A gradient that is not finite, on rank 0 alone."""
    batches = rank_batches(step, topology.data_rank, topology.data)
    if topology.rank == 0:
        batches[-1].media[Modality.IMAGE].fill_(math.inf)
        batches[0].media[Modality.IMAGE].fill_(math.inf)
    return engine.train_step(batches, rate(step))


def train_with_one_bad_step(topology: Topology, setting: Setting) -> tuple[Trained, list[bool]]:
    engine = tiny_engine(topology, setting)
    reports = take_steps(engine, topology, [0, 1])
    reports.append(poisoned_step(engine, topology, 2))
    reports += take_steps(engine, topology, [3, 4])
    good = [report for report in reports if not report.skipped]
    return outcome(engine, good), [report.skipped for report in reports]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_skipped_step_leaves_nothing_behind(run_on, setting, precision):
    setting = replace(setting, precision=precision)
    results = run_on(2, train_with_one_bad_step, setting)
    assert [skipped for _, skipped in results] == [[False, False, True, False, False]] * 2
    got = together([trained for trained, _ in results])
    if precision == "fp32":
        assert difference(got, reference_training((0, 1, 3, 4))) <= 1e-5
    else:
        on_device = run_on(2, train_with_one_bad_step, replace(setting, offload=False))
        assert difference(got, together([trained for trained, _ in on_device])) <= 1e-5


def resume(topology: Topology, setting: Setting) -> tuple[float, Trained]:
    """Two steps offloaded, the rest by an engine of the other kind that takes over the state."""
    first = tiny_engine(topology, setting)
    reports = take_steps(first, topology, [0, 1])
    second = tiny_engine(topology, replace(setting, offload=not setting.offload))
    saved = {name: global_state.gather(tensor) for name, tensor in first.state_dict().items()}
    second.load_state_dict(first.state_dict())
    loaded = {name: global_state.gather(tensor) for name, tensor in second.state_dict().items()}
    assert saved.keys() == loaded.keys()
    apart = max(float((saved[name] - loaded[name]).abs().max()) for name in saved)
    return apart, outcome(second, reports + take_steps(second, topology, [2, 3, 4]))


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("setting", SETTINGS)
def test_state_moves_to_host_memory_and_back(run_on, setting, offload):
    results = run_on(2, resume, replace(setting, offload=offload))
    assert [apart for apart, _ in results] == [0.0, 0.0]
    assert difference(together([trained for _, trained in results]), reference_training()) <= 1e-5


def devices_of_state(topology: Topology, setting: Setting) -> set[tuple[str, str]]:
    """Kind and device of what an offloaded stage keeps, after a step."""
    (stage,) = tiny_stages(topology, setting)
    optimizer = adamw(stage, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-5, fused=True)
    sharded = ZeroStage(
        stage,
        topology,
        optimizer,
        zero_stage=setting.zero_stage,
        precision="bf16",
        deepspeed_config={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    )
    sharded.begin_step()
    batch = own_batches(0, topology)[0].to(topology.device)
    ids = stack_ids(batch)
    loss = sharded.forward(batch.token_ids, ids, batch.media, stage.build_mask(ids))
    sharded.backward(loss, None, is_last=True)
    gradients = [tensor for group in sharded.gradients() for tensor in group.tensors]
    masters = list(optimizer.state)
    assert {gradient.data_ptr() for gradient in gradients} == {master.grad.data_ptr() for master in masters}
    sharded.optimizer_step(1e-3)
    assert all(master.dtype == torch.float32 and optimizer.state[master]["step"] == 1 for master in masters)
    found = {("gradient", gradient.device.type) for gradient in gradients} | {
        ("master", m.device.type) for m in masters
    }
    return found | {
        (moment, optimizer.state[m][moment].device.type) for moment in global_state.MOMENTS for m in masters
    }


@pytest.mark.parametrize("setting", SETTINGS)
def test_master_weights_moments_and_gradients_are_in_host_memory(run_on, setting):
    (found,) = run_on(1, devices_of_state, setting)
    assert found == {(kind, "cpu") for kind in ("gradient", "master", *global_state.MOMENTS)}
