"""The engine: optimizer steps of a model that is distributed over tensor, pipeline and data ranks.

The ShardedStages hold the layers and the optimizer state. The engine runs them by the pipeline schedule and decides
what concerns all ranks:

- The loss is a sum until the last moment: supervised tokens of the whole step are counted over all data ranks first.
  The stages average gradients over data ranks, so the loss is multiplied by data ranks / supervised tokens.
- One all-reduce over the world carries the loss, the squared gradient norm, and the control requests. Each element of
  the gradient counts once: copies on other tensor ranks and in the last stage's tied LM head are left out.
- A gradient that is not finite on any rank makes all ranks skip the step; so does ``should_apply_update``, which sees
  the same numbers on every rank.
- Ids are sent with the hidden states, each stage builds the attention mask from what it received, and masks are
  compared over the ranks of a replica in the first step and every ``mask_check_interval`` steps after it.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from aki_megatron.engine import global_state
from aki_megatron.engine.base import (
    MAX_SKIPPED_IN_A_ROW,
    DivergedError,
    ParameterFilter,
    ShardedStage,
    every_parameter,
)
from aki_megatron.engine.inference import PipelineInference
from aki_megatron.engine.mask_consistency import MaskConsistencyChecker
from aki_megatron.engine.norm import clip_factor, squared_norm
from aki_megatron.engine.pipeline_step import PipelineContext, PipelineStep
from aki_megatron.model.sharding import shard_spec, shard_tensor, unshard_tensor
from aki_megatron.model.stage import global_names
from aki_megatron.parallel.batch_broadcast import broadcast_shapes
from aki_megatron.parallel.p2p_communication import P2PCommunicator
from aki_megatron.parallel.schedule import build_schedule
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Batch, ControlRequest, StepReport

CONTROL_REQUESTS = (ControlRequest.SAVE, ControlRequest.STOP)
"""Each has an element in the all-reduce at the end of a step."""


def _always(_loss: float, _norm: float) -> bool:
    return True


def _ignore_phase(_phase: str) -> None:
    pass


class PipelineEngine:
    """Engine (see engine/base.py) over tensor, pipeline and data ranks."""

    def __init__(
        self,
        stages: Sequence[ShardedStage],
        topology: Topology,
        *,
        num_microbatches: int,
        precision: Literal["bf16", "fp32"],
        max_grad_norm: float,
        mask_check_interval: int,
        update_counters: Sequence[int] = (0,),
        should_apply_update: Callable[[float, float], bool] = _always,
        set_phase: Callable[[str], None] = _ignore_phase,
    ) -> None:
        """Run this rank's ``stages``, one per virtual stage, in model order; every rank has the same number of them.

        num_microbatches    per step and data rank
        max_grad_norm        limit of the global gradient norm
        mask_check_interval  steps between comparisons of attention masks
        update_counters      TrainingPlan.update_counters: the numbers of updates that the global state holds
        should_apply_update  called on every rank before each update with the same loss and finite gradient norm; False
                             skips the step
        set_phase            told what this rank does, several times per micro-batch: it must be cheap
        """
        self._stages = stages
        self._topology = topology
        self._num_micro_batches = num_microbatches
        self._max_grad_norm = max_grad_norm
        self._mask_check_interval = mask_check_interval
        self._should_apply_update = should_apply_update
        self._set_phase = set_phase
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        schedules = build_schedule(
            pipeline=topology.pipeline, virtual_stages=len(stages), num_microbatches=num_microbatches
        )
        hidden_size = stages[0].module.config.decoder.hidden_size
        self._context = PipelineContext(
            stages=stages,
            topology=topology,
            communicator=P2PCommunicator(topology, hidden_size=hidden_size, dtype=dtype),
            schedule=schedules[topology.pipeline_rank],
            dtype=dtype,
            set_phase=set_phase,
            first_trained=_first_trained(stages, topology),
        )
        self._inference = PipelineInference(self._context, num_microbatches)
        self._mesh = DeviceMesh.from_group(topology.pipeline_stage_group, topology.device.type)
        self._global_names = [global_names(stage.module) for stage in stages]
        self._num_updates = dict.fromkeys(update_counters, 0)
        self._steps_taken = 0
        self._not_finite_in_a_row = 0

    def train_step(
        self, microbatches: Sequence[Batch], lr: float, *, control: ControlRequest = ControlRequest.NONE
    ) -> StepReport:
        started = time.perf_counter()
        topology = self._topology
        self._set_phase("counting tokens")
        shapes = broadcast_shapes(microbatches, self._num_micro_batches, topology)
        counts = [
            (s.supervised_tokens, s.tokens, s.num_sequences * s.sequence_length, s.num_media,
             s.num_bad_samples, s.num_cut_samples)
            for s in shapes
        ]  # fmt: skip
        supervised, *others = topology.sum_over_data([sum(column) for column in zip(*counts, strict=True)])
        tokens, positions, images, bad_samples, cut_samples = (int(number) for number in others)
        checks_masks = self._steps_taken % self._mask_check_interval == 0
        checker = MaskConsistencyChecker(topology) if checks_masks else None
        loss = PipelineStep(self._context, microbatches, shapes, topology.data / max(supervised, 1), checker).run()
        if checker is not None:
            checker.compare()
        self._set_phase("reducing gradients")
        loss_sum, norm, requests = self._reduce(loss, control)
        mean_loss = loss_sum / max(supervised, 1)
        skipped = not (math.isfinite(norm) and self._should_apply_update(mean_loss, norm))
        self._set_phase("optimizer step")
        self._update(lr, None if skipped else norm)
        self._steps_taken += 1
        self._check_divergence(is_finite=math.isfinite(norm))
        return StepReport(
            loss=mean_loss,
            grad_norm=norm,
            lr=lr,
            supervised_tokens=int(supervised),
            tokens=tokens,
            positions=positions,
            images=images,
            bad_samples=bad_samples,
            seconds=time.perf_counter() - started,
            skipped=skipped,
            control=requests,
            cut_samples=cut_samples,
        )

    def forward_losses(self, microbatches: Sequence[Batch], *, check_masks: bool = False) -> list[float]:
        return self._inference.losses(microbatches, check_masks=check_masks)

    def next_tokens(self, microbatches: Sequence[Batch]) -> list[list[int]]:
        return self._inference.next_tokens(microbatches)

    def _update(self, lr: float, norm: float | None) -> None:
        """Apply the gradients, of this global norm; None: skip the step."""
        for stage in self._stages:
            if norm is None:
                stage.skip_step()
                continue
            if (factor := clip_factor(norm, self._max_grad_norm)) < 1.0:
                stage.scale_gradients(factor)
            stage.optimizer_step(lr)
        if norm is not None:
            self._num_updates = {since: count + 1 for since, count in self._num_updates.items()}

    def _reduce(self, loss: Tensor, control: ControlRequest) -> tuple[float, float, ControlRequest]:
        """Sum tied gradients over their two copies; return summed loss, gradient norm and requests of the world.

        The norm is inf where a gradient is not finite.
        """
        topology = self._topology
        square = torch.zeros((), dtype=torch.float64, device=topology.device)
        for stage in self._stages:
            for group in stage.gradients():
                is_copy = group.tied and stage.module.input_embedder is None
                if group.tied and topology.pipeline > 1:
                    for tensor in group.tensors:
                        dist.all_reduce(tensor, group=topology.embedding_group)
                if not is_copy and (group.tensor_sharded or topology.tensor_rank == 0):
                    square += squared_norm(group.tensors, topology.device)
        counted_loss = loss.double() if topology.tensor_rank == 0 else torch.zeros_like(square)
        requested = torch.tensor(
            [float(request in control) for request in CONTROL_REQUESTS], dtype=torch.float64, device=topology.device
        )
        sums = torch.cat([torch.stack([counted_loss, square]), requested])
        dist.all_reduce(sums)
        loss_sum, square_sum, *counts = sums.tolist()
        requests = (request for request, count in zip(CONTROL_REQUESTS, counts, strict=True) if count)
        norm = math.sqrt(square_sum) if math.isfinite(square_sum) else math.inf
        return loss_sum, norm, ControlRequest(sum(requests))

    def _check_divergence(self, *, is_finite: bool) -> None:
        self._not_finite_in_a_row = 0 if is_finite else self._not_finite_in_a_row + 1
        if self._not_finite_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"The gradient was not finite in {self._not_finite_in_a_row} steps in a row: training has diverged. "
                "Lower optimizer.lr, lengthen optimizer.warmup_steps, or check the data, and resume from a checkpoint."
            )

    def state_dict(self, is_included: ParameterFilter = every_parameter) -> dict[str, Tensor]:
        """Return the global state (see Engine); frozen parameters have a weight but no moments."""
        tensors: dict[str, Tensor] = {}
        for stage, name, moment, key in self._entries(is_included):
            tensors[key] = global_state.shard_first_dim(self._full_tensor(stage, name, moment), self._mesh)
        for since, count in self._num_updates.items():
            tensors[global_state.step_key(since)] = torch.tensor(float(count))
        return tensors

    def load_state_dict(self, tensors: Mapping[str, Tensor], is_included: ParameterFilter = every_parameter) -> None:
        """Load the global state (see Engine); ``tensors`` has exactly the names that ``state_dict`` returns."""
        topology = self._topology
        for stage, name, moment, key in self._entries(is_included):
            spec = shard_spec(name, stage.module.config.decoder)
            full = global_state.gather(tensors[key])
            stage.set_full_param(name, shard_tensor(full, spec, topology.tensor_rank, topology.tensor), moment)
        self._num_updates = {since: int(tensors[global_state.step_key(since)]) for since in self._num_updates}
        for stage in self._stages:
            stage.set_num_updates(self._num_updates)
            stage.sync_params()
        self._not_finite_in_a_row = 0

    def named_weights(self, is_included: ParameterFilter = every_parameter) -> Iterator[tuple[str, Tensor]]:
        for stage, names in zip(self._stages, self._global_names, strict=True):
            for name in names:
                if is_included(names[name]):
                    yield names[name], self._full_tensor(stage, name)

    def _entries(self, is_included: ParameterFilter) -> Iterator[tuple[ShardedStage, str, str | None, str]]:
        """Yield stage, parameter name, moment (None: the weight) and global key of every tensor of the state."""
        for stage, names in zip(self._stages, self._global_names, strict=True):
            for name, parameter in stage.module.named_parameters():
                if not is_included(names[name]):
                    continue
                yield stage, name, None, global_state.key(global_state.WEIGHT, names[name])
                for moment in global_state.MOMENTS if parameter.requires_grad else ():
                    yield stage, name, moment, global_state.key(moment, names[name])

    def _full_tensor(self, stage: ShardedStage, name: str, moment: str | None = None) -> Tensor:
        """Return a master weight or moment, full and float32; collective over the ranks of the pipeline stage."""
        local = stage.get_full_param(name, moment)
        spec = shard_spec(name, stage.module.config.decoder)
        if spec is None or self._topology.tensor == 1:
            return local
        shards = [torch.empty_like(local) for _ in range(self._topology.tensor)]
        dist.all_gather(shards, local.contiguous(), group=self._topology.tensor_group)
        return unshard_tensor(shards, spec)


def _first_trained(stages: Sequence[ShardedStage], topology: Topology) -> int:
    """Return the index in the whole model of the first stage with a trainable parameter; collective.

    Where none has one it is the number of stages of the whole model.
    """
    first = topology.pipeline * len(stages)
    for virtual_stage in reversed(range(len(stages))):
        if any(parameter.requires_grad for parameter in stages[virtual_stage].module.parameters()):
            first = virtual_stage * topology.pipeline + topology.pipeline_rank
    if topology.pipeline == 1:
        return first
    smallest = torch.tensor(first, device=topology.device)
    dist.all_reduce(smallest, dist.ReduceOp.MIN, group=topology.pipeline_group)
    return int(smallest)
