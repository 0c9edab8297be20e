"""Every start checks that each parameter's weight and moments are read and written in the right place.

The check leaves the state as it was: bit for bit the stage's weights, and moments of zero.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import OPTIMIZER, Setting, shard_stage, tiny_stages

from aki_megatron.engine import global_state
from aki_megatron.engine.optimizer import adamw
from aki_megatron.engine.zero_stage import ZeroStage
from aki_megatron.errors import ConfigError
from aki_megatron.parallel.topology import Topology

pytestmark = pytest.mark.distributed
ROUND_ROBIN = (("round_robin_gradients", True), ("reduce_bucket_size", 1000))


def build_error(build: Callable[[], ZeroStage]) -> str:
    try:
        build()
    except ConfigError as error:
        return str(error)
    return "built"


def round_robin_error(topology: Topology, setting: Setting) -> str:
    return build_error(lambda: shard_stage(*tiny_stages(topology, setting), topology, setting))


@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_round_robin_gradients_is_found(run_on, zero_stage, precision):
    setting = Setting(zero_stage=zero_stage, precision=precision, zero_settings=ROUND_ROBIN)
    first, second = run_on(2, round_robin_error, setting)
    assert first == second
    assert "on rank 0, the module's parameter after sync_params of input_embedder." in first
    assert first.endswith("Remove zero_optimization.round_robin_gradients from the file given to --ds_config.")


def forget_to_sync(stage: ZeroStage) -> None:
    stage.sync_params = lambda: None


def return_rounded_weights(stage: ZeroStage) -> None:
    right = stage.get_full_param
    stage.get_full_param = lambda name, moment=None: right(name, moment).bfloat16().float()


def exchange_moments(stage: ZeroStage) -> None:
    """Two parameters of one shape refer to each other's moments, in reading and in writing."""
    first, second = (f"layers.{layer}.attention.qkv_proj.weight" for layer in (0, 1))
    other = {first: second, second: first}
    get, set_ = stage.get_full_param, stage.set_full_param
    stage.get_full_param = lambda name, moment=None: get(other.get(name, name) if moment else name, moment)
    stage.set_full_param = lambda name, value, moment=None: set_(
        other.get(name, name) if moment else name, value, moment
    )


def ignore_moments(stage: ZeroStage) -> None:
    right = stage.set_full_param
    stage.set_full_param = lambda name, value, moment=None: None if moment else right(name, value)


def round_weights_on_one_rank(stage: ZeroStage) -> None:
    if dist.get_rank() == 1:
        return_rounded_weights(stage)


FAULTS: dict[Callable[[ZeroStage], None], str] = {
    forget_to_sync: "on rank 0, the module's parameter after sync_params of ",
    return_rounded_weights: "on rank 0, get_full_param, weight, of input_embedder.vision_encoder.",
    exchange_moments: "get_full_param, exp_avg of the elements of the master weight, of layers.0.attention.qkv_proj",
    ignore_moments: "on rank 0, get_full_param, exp_avg after set_full_param, of ",
    round_weights_on_one_rank: "on rank 1, get_full_param, weight, of input_embedder.vision_encoder.",
}


class FaultyStage(ZeroStage):
    """A stage that accesses its state wrongly."""

    def __init__(self, fault: Callable[[ZeroStage], None], *args: Any, **more: Any) -> None:
        fault(self)
        super().__init__(*args, **more)


def build_faulty(topology: Topology, zero_stage: int) -> dict[str, str]:
    """Return the error of a stage with each fault."""
    return {fault.__name__: build_error(partial(build_faulty_stage, topology, zero_stage, fault)) for fault in FAULTS}


def build_faulty_stage(topology: Topology, zero_stage: int, fault: Callable[[ZeroStage], None]) -> ZeroStage:
    (stage,) = tiny_stages(topology, Setting())
    settings = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": False}
    return FaultyStage(
        fault,
        stage,
        topology,
        adamw(stage, **OPTIMIZER),
        zero_stage=zero_stage,
        precision="bf16",
        deepspeed_config=settings,
    )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_any_wrong_accessor_is_found_and_the_settings_are_named(run_on, zero_stage):
    first, second = run_on(2, build_faulty, zero_stage)
    assert first == second
    for fault, message in FAULTS.items():
        assert message in first[fault.__name__]
        assert "Remove zero_optimization.reduce_bucket_size and wall_clock_breakdown from" in first[fault.__name__]


SOUND = [
    *(Setting(zero_stage=zero_stage, precision=kind) for zero_stage in (1, 2, 3) for kind in ("fp32", "bf16")),
    *(Setting(zero_stage=zero_stage, precision="bf16", offload=True) for zero_stage in (2, 3)),
    # DeepSpeed's optimizer for bf16 in ZeRO-1 does not read this setting
    Setting(zero_stage=1, precision="bf16", zero_settings=ROUND_ROBIN),
]


def changed_by_the_check(topology: Topology) -> list[str]:
    """Return what differs from the stage's own weights and moments of zero after an engine was built."""
    changed = []
    for setting in SOUND:
        (original,) = tiny_stages(topology, setting)
        weights = {name: weight.detach() for name, weight in original.named_parameters()}
        (stage,) = tiny_stages(topology, setting)
        sharded = shard_stage(stage, topology, setting)
        for name, weight in weights.items():
            changed += [] if torch.equal(sharded.get_full_param(name).cpu(), weight) else [f"{setting} {name}"]
            for moment in global_state.MOMENTS if stage.get_parameter(name).requires_grad else ():
                changed += [f"{setting} {name} {moment}"] if sharded.get_full_param(name, moment).any() else []
        with sharded.gathered_params():
            for name, parameter in stage.named_parameters():
                rounded = weights[name].to(parameter.dtype)
                changed += [] if torch.equal(parameter.cpu(), rounded) else [f"{setting} parameter {name}"]
    return changed


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_check_leaves_weights_and_moments_as_they_were(run_on, ranks):
    assert run_on(ranks, changed_by_the_check) == [[]] * ranks
