"""A pipeline stage under DeepSpeed, and without it, equals plain torch, whatever order its passes come in.

Two stages, the halves of the tiny model, share one process, as virtual stages of a pipeline rank do, each with several
forward passes before a backward pass and several backward passes after one another.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import MODEL, OPTIMIZER, TIED_MODEL, draw_batch
from torch import Tensor, nn

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.engine import global_state
from aki_megatron.engine.ddp_stage import DDPStage
from aki_megatron.engine.norm import squared_norm
from aki_megatron.engine.optimizer import adamw
from aki_megatron.engine.zero_stage import ZeroStage
from aki_megatron.model.stage import Stage, build_stage
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Batch, stack_ids

pytestmark = pytest.mark.distributed
Sharded = ZeroStage | DDPStage

HALVES = (range(0, 2), range(2, 4))
MICRO_BATCHES = 3
LR = 1e-2
ORDER = [(0, "F", 0), (0, "F", 1), (1, "F", 0), (1, "B", 0), (0, "B", 0), (0, "F", 2), (1, "F", 1), (1, "F", 2)]
ORDER += [(1, "B", 1), (0, "B", 1), (1, "B", 2), (0, "B", 2)]
"""(stage, pass, micro-batch): the first stage runs F F B F B B, the second F B F F B B."""


@dataclass(frozen=True)
class Kind:
    zero_stage: int
    precision: str = "fp32"
    recompute: bool = False
    zero_settings: tuple[tuple[str, Any], ...] = ()


def shard_stage(stage: Stage, topology: Topology, kind: Kind) -> Sharded:
    optimizer = adamw(stage, **OPTIMIZER)
    if kind.zero_stage == 0:
        return DDPStage(stage, topology, optimizer)
    config = {"zero_optimization": dict(kind.zero_settings)}
    return ZeroStage(
        stage, topology, optimizer, zero_stage=kind.zero_stage, precision=kind.precision, deepspeed_config=config
    )


def halves(kind: Kind) -> list[Stage]:
    return [
        build_stage(MODEL, layers, attention=AttentionConfig(rule="mma"), recompute=kind.recompute) for layers in HALVES
    ]


def run_order(sharded_stages: list[Sharded], topology: Topology, batches: list[Batch], scale: float) -> Tensor:
    """All passes of one step in ORDER; returns the summed loss."""
    batches = [batch.to(topology.device) for batch in batches]
    hidden: dict[tuple[int, int], Tensor] = {}
    outputs: dict[tuple[int, int], Tensor] = {}
    for sharded in sharded_stages:
        sharded.begin_step()
    for index, kind, microbatch_index in ORDER:
        sharded, batch = sharded_stages[index], batches[microbatch_index]
        last = microbatch_index == MICRO_BATCHES - 1
        if kind == "F":
            inputs = batch.token_ids
            if index:
                inputs = hidden[index, microbatch_index] = outputs[0, microbatch_index].detach().requires_grad_()
            ids = stack_ids(batch)
            outputs[index, microbatch_index] = sharded.forward(inputs, ids, batch.media, sharded.module.build_mask(ids))
        elif index:
            sharded.backward(outputs[index, microbatch_index] * scale, None, is_last=last)
        else:
            sharded.backward(outputs[index, microbatch_index], hidden[1, microbatch_index].grad, is_last=last)
    return torch.stack([outputs[1, microbatch_index].detach() for microbatch_index in range(MICRO_BATCHES)]).sum()


class Reference:
    """The same two stages in plain torch: one process that sees the micro-batches of all data ranks."""

    def __init__(self, kind: Kind) -> None:
        self.stages = halves(kind)
        self.bf16 = kind.precision == "bf16"
        self.optimizers = [adamw(stage, **OPTIMIZER) for stage in self.stages]

    def accumulate(self, batches: list[Batch]) -> Tensor:
        """Gradients of the mean loss over ``batches``; returns the summed loss."""
        supervised = sum(batch.supervised_tokens for batch in batches)
        total = torch.zeros(())
        for batch in batches:
            first, second = [_rounded(stage) if self.bf16 else stage for stage in self.stages]
            ids = stack_ids(batch)
            media = {modality: items.bfloat16() if self.bf16 else items for modality, items in batch.media.items()}
            loss = second(first(batch.token_ids, ids, media), ids)
            (loss * (1.0 / supervised)).backward()  # rounds as the stages' loss does
            total += loss.detach()
            for stage, rounded in zip(self.stages, (first, second), strict=True) if self.bf16 else ():
                _add_gradients(stage, rounded)
        return total

    def scale(self, factor: float) -> None:
        for stage in self.stages:
            for parameter in stage.parameters():
                if parameter.grad is not None:
                    parameter.grad *= factor

    def update(self) -> None:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LR
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def tensor(self, index: int, name: str, moment: str | None) -> Tensor:
        parameter = self.stages[index].get_parameter(name)
        return parameter.detach() if moment is None else self.optimizers[index].state[parameter][moment]


def _rounded(stage: Stage) -> Stage:
    """A copy with bf16 weights; buffers keep their precision."""
    copied = copy.deepcopy(stage)
    for parameter in copied.parameters():
        parameter.data, parameter.grad = parameter.data.bfloat16(), None
    return copied


def _add_gradients(master: nn.Module, rounded: nn.Module) -> None:
    for kept, copied in zip(master.parameters(), rounded.parameters(), strict=True):
        if kept.requires_grad:
            kept.grad = copied.grad.float() + (0 if kept.grad is None else kept.grad)


def norm_differences(sharded_stages: list[Sharded], reference: Reference, topology: Topology) -> list[float]:
    """How far the norm of each parameter group's gradients, summed over the data ranks, is from the reference's."""
    found = []
    for sharded, optimizer in zip(sharded_stages, reference.optimizers, strict=True):
        for group, plain in zip(sharded.gradients(), optimizer.param_groups, strict=True):
            assert (group.tensor_sharded, group.tied) == (plain["tensor_sharded"], plain["tied"])
            assert all(tensor.dtype == torch.float32 for tensor in group.tensors)
            square = squared_norm(group.tensors, topology.device)
            dist.all_reduce(square, group=topology.data_group)
            want = float(squared_norm([parameter.grad for parameter in plain["params"]], torch.device("cpu")).sqrt())
            found.append(abs(float(square.sqrt()) - want) / max(want, 1e-9))  # some gradients are all zero
    return found


def state_differences(sharded_stages: list[Sharded], reference: Reference) -> list[float]:
    """How far weights and moments are from the reference's; the first moment is the gradient but for a factor."""
    found = []
    for index, sharded in enumerate(sharded_stages):
        for name, parameter in sharded.module.named_parameters():
            for moment in (None, *global_state.MOMENTS) if parameter.requires_grad else (None,):
                got, want = sharded.get_full_param(name, moment).cpu(), reference.tensor(index, name, moment)
                assert got.dtype == torch.float32 and got.shape == want.shape
                found.append(float((got - want).abs().max()))
    return found


def train(topology: Topology, kind: Kind) -> dict[str, float]:
    """Four steps: plain, scaled, discarded, after the discarded one. Returns the largest differences of each kind."""
    sharded_stages, reference = [shard_stage(stage, topology, kind) for stage in halves(kind)], Reference(kind)
    norms: list[float] = []
    states: list[float] = []
    losses: list[float] = []
    for step in range(4):
        batches = [draw_batch(step, number) for number in range(MICRO_BATCHES * topology.data)]
        supervised = sum(batch.supervised_tokens for batch in batches)
        loss = run_order(
            sharded_stages, topology, batches[topology.data_rank :: topology.data], topology.data / supervised
        )
        dist.all_reduce(loss, group=topology.data_group)
        losses.append(abs(float(loss) - float(reference.accumulate(batches))) / supervised)
        norms += norm_differences(sharded_stages, reference, topology)
        if step == 1:
            for sharded in sharded_stages:
                sharded.scale_gradients(0.25)
            reference.scale(0.25)
            norms += norm_differences(sharded_stages, reference, topology)
        for sharded in sharded_stages:
            sharded.skip_step() if step == 2 else sharded.optimizer_step(LR)
        if step != 2:
            reference.update()
        reference.zero_grad()
        states += state_differences(sharded_stages, reference)
        if kind.precision == "bf16":
            break  # from here on rounding decides
        assert [num_updates(sharded) for sharded in sharded_stages] == [{(1, 2, 2, 3)[step]}] * 2
    return {"losses": max(losses), "norms": max(norms), "states": max(states)}


def num_updates(sharded: Any) -> set[int]:
    """Updates that AdamW has counted, over all of its tensors."""
    return {int(state["step"]) for state in sharded._adamw.state.values()}


KINDS = [
    Kind(0),
    Kind(0, recompute=True),
    Kind(1),
    Kind(2),
    Kind(2, zero_settings=(("reduce_bucket_size", 700), ("overlap_comm", True))),
    Kind(3),
    Kind(3, recompute=True),
    Kind(3, zero_settings=(("sub_group_size", 700), ("reduce_bucket_size", 700))),
]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_two_stages_equal_plain_torch(run_on, record_property, kind, ranks):
    for differences in run_on(ranks, train, kind):
        record_property("largest_differences", differences)
        assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_two_stages_in_bf16_equal_plain_torch_in_bf16(run_on, record_property, zero_stage, ranks):
    for differences in run_on(ranks, train, Kind(zero_stage, "bf16")):
        record_property("largest_differences", differences)
        assert max(differences.values()) <= 1e-5, differences


def build_in_bf16(topology: Topology, zero_stage: int) -> tuple[float, float]:
    """What a buffer has become under DeepSpeed, and the most that a master weight has lost."""
    (stage, _), (reference, _) = halves(Kind(0)), halves(Kind(0))
    stage.register_buffer("angle", torch.tensor([1 / 3]))
    sharded = shard_stage(stage, topology, Kind(zero_stage, "bf16"))
    assert {parameter.dtype for parameter in stage.parameters()} == {torch.bfloat16}
    weights = [(name, weight) for name, weight in reference.named_parameters() if weight.requires_grad]
    return float(stage.angle), max(
        float((sharded.get_full_param(name).cpu() - weight).abs().max()) for name, weight in weights
    )


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16_rounds_neither_buffers_nor_master_weights(run_on, zero_stage):
    assert run_on(2, build_in_bf16, zero_stage) == [(float(torch.tensor(1 / 3)), 0.0)] * 2


def overwrite(topology: Topology, kind: Kind) -> tuple[float, float]:
    """Set a state that was never trained and use it; return the differences of the state, and of the loss with it."""
    sharded_stages, reference = [shard_stage(stage, topology, kind) for stage in halves(kind)], Reference(kind)
    batches = [draw_batch(0, number) for number in range(MICRO_BATCHES)]
    reference.accumulate(batches)
    reference.update()
    draw = torch.Generator().manual_seed(5)
    for index, sharded in enumerate(sharded_stages):
        for name, parameter in reference.stages[index].named_parameters():
            for moment in (None, *global_state.MOMENTS) if parameter.requires_grad else (None,):
                tensor = reference.tensor(index, name, moment)
                tensor.copy_(torch.rand(tensor.shape, generator=draw) * 0.2)
                sharded.set_full_param(name, tensor.to(topology.device), moment)
        sharded.set_num_updates({0: 7})
        assert num_updates(sharded) == {7}
        sharded.sync_params()
    state_difference = max(state_differences(sharded_stages, reference))
    reference.zero_grad()
    loss = run_order(sharded_stages, topology, batches, 1.0)
    return state_difference, abs(float(loss) / float(reference.accumulate(batches)) - 1)


@pytest.mark.parametrize("kind", [Kind(0), Kind(1), Kind(2), Kind(3)])
def test_params_that_are_set_are_returned_and_used(run_on, kind):
    for state_difference, loss_difference in run_on(2, overwrite, kind):
        assert state_difference == 0.0 and loss_difference <= 1e-6


COLLECTIVES = ["all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter", "barrier", "reduce"]
COLLECTIVES += ["reduce_scatter_tensor", "all_to_all_single", "all_gather_object", "broadcast_object_list", "new_group"]
COLLECTIVES += ["gather", "scatter", "send", "recv", "gather_object", "monitored_barrier"]


@contextmanager
def recorded(calls: list[str]) -> Iterator[None]:
    """Note every collective over the world by its name."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def recording(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            group = next((a for a in (*args, *kwargs.values()) if isinstance(a, dist.ProcessGroup)), dist.group.WORLD)
            if group is dist.group.WORLD:
                calls.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(dist, name, recording(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def step_alone(sharded: Sharded, first: bool, microbatch_index: int, topology: Topology) -> None:
    """One step of one stage; what the other would send is random."""
    sharded.begin_step()
    outputs = []
    for number in range(microbatch_index):
        batch = draw_batch(0, number).to(topology.device)
        ids = stack_ids(batch)
        hidden = torch.randn(*batch.token_ids.shape, MODEL.decoder.hidden_size, device=topology.device)
        inputs = batch.token_ids if first else hidden.to(next(sharded.module.parameters()).dtype).requires_grad_()
        outputs.append(sharded.forward(inputs, ids, batch.media if first else {}, sharded.module.build_mask(ids)))
    for number, output in enumerate(outputs):
        sharded.backward(output, torch.randn_like(output) if first else None, is_last=number == microbatch_index - 1)


def run_at_different_times(topology: Topology, kind: Kind) -> tuple[list[str], list[str]]:
    """Pipeline ranks run different numbers of steps and micro-batches. Return their collectives over the world."""
    building: list[str] = []
    running: list[str] = []
    first = topology.is_first_pipeline_rank
    with recorded(building):
        sharded = shard_stage(
            build_stage(MODEL, HALVES[topology.pipeline_rank], attention=AttentionConfig(rule="mma")), topology, kind
        )
    with recorded(running):
        for step in range(3 if first else 1):
            step_alone(sharded, first, 2 if first else 3, topology)
            sharded.skip_step() if step == 1 else sharded.optimizer_step(LR)
        name = next(iter(dict(sharded.module.named_parameters())))
        assert sharded.get_full_param(name).isfinite().all()
    return building, running


@pytest.mark.parametrize("kind", [Kind(0), Kind(1), Kind(1, "bf16"), Kind(2), Kind(3)])
def test_stages_at_different_times_do_not_wait_for_each_other(run_on, kind):
    results = run_on(4, run_at_different_times, kind, pipeline=2)
    assert results == [([], [])] * 4


def number_tied_gradients(topology: Topology, kind: Kind) -> dict[str, Tensor]:
    """Set each tied gradient to its index in this rank's part. Return the gradients as the update saw them."""
    stage = build_stage(TIED_MODEL, HALVES[topology.pipeline_rank], attention=AttentionConfig(rule="mma"))
    sharded = shard_stage(stage, topology, kind)
    step_alone(sharded, topology.is_first_pipeline_rank, 2, topology)
    tied = [group for group in sharded.gradients() if group.tied]
    assert len(tied) == 2 and [group.tensor_sharded for group in tied] == [False, True]
    for group in tied:
        start = 1 + 10_000 * topology.data_rank
        for tensor in group.tensors:
            tensor.copy_(torch.arange(start, start + tensor.numel()).view_as(tensor))
            start += tensor.numel()
    sharded.optimizer_step(LR)
    table, extra = (
        ("base.weight", "added_tokens") if topology.is_first_pipeline_rank else ("base.weight", "added_tokens.weight")
    )
    prefix = "input_embedder.token_embedding." if topology.is_first_pipeline_rank else "lm_head."
    return {
        "table": sharded.get_full_param(prefix + table, "exp_avg").cpu(),
        "extra": sharded.get_full_param(prefix + extra, "exp_avg").cpu(),
    }


@pytest.mark.parametrize("kind", [Kind(0), Kind(1), Kind(1, "bf16"), Kind(2), Kind(3)])
def test_tied_gradients_are_partitioned_alike_on_both_stages(run_on, kind):
    first, _, last, _ = run_on(4, number_tied_gradients, kind, pipeline=2)
    for name, gradient in first.items():
        assert torch.equal(gradient, last[name])
        assert len(gradient.unique()) == gradient.numel()
