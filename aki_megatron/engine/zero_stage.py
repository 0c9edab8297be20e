"""ShardedStage under DeepSpeed ZeRO 1, 2 or 3 over its data ranks. The only module that imports deepspeed.

Differences from an ordinary DeepSpeed engine:
- Forward and backward passes run in any order a pipeline schedule asks for, several forwards before a backward.
- Averaged gradients are handed out for the exact global norm, clipping and skipping of our engine. DeepSpeed's norm,
  clipping and overflow checks are off, so DeepSpeed communicates only within the stage's data-parallel group.
- ZeRO-3 gathers each parameter once per step: all of them before the first micro-batch, and none is released until the
  step is done. DeepSpeed's hooks around each module, which require all ranks of the world to run the same modules in
  the same order, are removed. Parameters are whole during a step and partitioned between steps.
- In bf16 the master weights start as the stage's float32 weights, not as those weights rounded to bf16, and frozen
  weights, which have no master weights, are kept in float32 too.
- Every start checks that DeepSpeed's links from parameters to their weights and moments are right (state_check.py).

The stage is built whole on every rank's CPU and given to deepspeed.initialize, which partitions it.
Private parts of DeepSpeed are used here and in zero_state.py only, and only in versions tested by the equality tests.
"""

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from aki_megatron.attention import AttentionMask
from aki_megatron.engine import global_state
from aki_megatron.engine.base import GradientGroup
from aki_megatron.engine.frozen_weights import FrozenWeights
from aki_megatron.engine.optimizer import init_moments, set_learning_rate
from aki_megatron.engine.settings import deepspeed_settings
from aki_megatron.engine.state_check import check_state_access
from aki_megatron.engine.zero_state import build_zero_state
from aki_megatron.errors import ConfigError
from aki_megatron.model.stage import Stage
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Modality, StackedIds

TESTED_VERSIONS = ("0.19.8",)
"""DeepSpeed versions whose private parts used here are tested."""


class ZeroStage:
    """A ShardedStage whose state DeepSpeed partitions over the data ranks."""

    def __init__(
        self,
        module: Stage,
        topology: Topology,
        optimizer: torch.optim.AdamW,
        *,
        zero_stage: Literal[1, 2, 3],
        precision: Literal["bf16", "fp32"],
        deepspeed_config: Mapping[str, Any],
    ) -> None:
        """Wrap ``module`` (float32, on the CPU, same weights on every data rank) and partition it in place; collective
        over the data ranks.

        optimizer         over the trainable parameters, at least one, in the groups of optimizer.parameter_groups
        deepspeed_config  further DeepSpeed settings in its own format; what the run decides overrides them

        Raises ConfigError for settings or versions of DeepSpeed that are not supported, and on every data rank for
        settings under which weights or optimizer state would be read or written wrongly on any of them.
        """
        self.module = module
        self._deepspeed = _deepspeed()
        self._topology = topology
        self._adamw = optimizer
        self._zero_stage = zero_stage
        self._group_flags = [(group["tensor_sharded"], group["tied"]) for group in optimizer.param_groups]
        self._update_counters = [group["update_counter"] for group in optimizer.param_groups]
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        weights = _fp32_weights(module, topology.device)
        assert all(parameter.dim() for parameter in module.parameters()), (
            "DeepSpeed cannot broadcast a scalar parameter"
        )
        settings = deepspeed_settings(
            deepspeed_config, zero_stage=zero_stage, precision=precision, num_ranks=topology.data
        )
        # one of its optimizers prints memory tables
        with contextlib.redirect_stdout(io.StringIO()), _barriers_within(topology.data_group):
            self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings, mpu=_DataParallelUnit(topology)
            )
        _restore_buffers(module, buffers)
        self._parameters = dict(module.named_parameters())
        self._state = build_zero_state(self._optimizer, list(self._parameters.values()))
        init_moments(optimizer, self._state.master_weights())
        self._state.link_moments()
        self._frozen = FrozenWeights(topology)
        shapes = {name: weight.shape for name, weight in weights.items()}
        check_state_access(self, topology, shapes=shapes, settings=deepspeed_config)
        self._set_initial_state(weights)

    def begin_step(self) -> None:
        self._state.gather_params()

    def forward(self, inputs: Tensor, ids: StackedIds, media: Mapping[Modality, Tensor], mask: AttentionMask) -> Tensor:
        return self._engine(inputs, ids, media, mask=mask)

    @torch.no_grad()
    def infer(
        self,
        inputs: Tensor,
        ids: StackedIds,
        media: Mapping[Modality, Tensor],
        mask: AttentionMask,
        *,
        next_tokens: bool,
    ) -> Tensor:
        # around DeepSpeed, whose forward pass prepares a backward pass
        run = self.module.next_tokens if next_tokens else self.module
        return run(inputs, ids, media, mask=mask)

    def end_inference(self) -> None:
        self._state.partition_params()

    def backward(self, output: Tensor, gradient: Tensor | None, *, is_last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(is_last)
        # only a forward pass clears the flag, but a pipeline may run two backward passes in a row
        self._optimizer.clear_backward_seen_flag()
        if gradient is None:
            self._engine.backward(output)
        else:
            output.backward(gradient)

    def gradients(self) -> list[GradientGroup]:
        """Return this rank's part of the averaged gradients; with offloading they are in host memory."""
        groups = zip(self._group_flags, self._state.gradients(), strict=True)
        return [GradientGroup(tensor_sharded, tied, tensors) for (tensor_sharded, tied), tensors in groups]

    def scale_gradients(self, factor: float) -> None:
        torch._foreach_mul_([tensor for group in self.gradients() for tensor in group.tensors], factor)

    def optimizer_step(self, lr: float) -> None:
        set_learning_rate(self._adamw, lr)
        self._engine.step()

    def skip_step(self) -> None:
        self._state.discard_gradients()

    def get_full_param(self, name: str, moment: str | None = None) -> Tensor:
        parameter = self._parameters[name]
        if not parameter.requires_grad:
            return self._frozen.get(name)
        if moment is None:
            return self._deepspeed.utils.safe_get_full_fp32_param(parameter).detach()
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, moment).detach()

    def set_full_param(self, name: str, value: Tensor, moment: str | None = None) -> None:
        parameter, utils = self._parameters[name], self._deepspeed.utils
        if not parameter.requires_grad:
            self._frozen.set(name, value)
        if self._zero_stage != 3:
            if not parameter.requires_grad:
                parameter.data.copy_(value)
            elif moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)
            return
        partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        own = global_state.zero_partition(value, partition.numel(), self._topology.data_rank)
        if not parameter.requires_grad:
            partition.data.copy_(own.view_as(partition))
        elif moment is None:
            utils.safe_set_local_fp32_param(parameter, own)
        else:
            utils.safe_set_local_optimizer_state(parameter, own, moment)

    def sync_params(self) -> None:
        self._state.sync_params()

    def set_num_updates(self, counts: Mapping[int, int]) -> None:
        for master, group in zip(self._state.master_weights(), self._state.master_groups(), strict=True):
            self._adamw.state[master]["step"].fill_(float(counts[self._update_counters[group]]))

    def gathered_params(self) -> contextlib.AbstractContextManager[None]:
        """Return a context inside which the module's parameters are whole; collective over the data ranks."""
        return self._state.gathered_params()

    def flat_state(self) -> Sequence[tuple[Tensor, Mapping[str, Tensor]]]:
        """Return this rank's flat master weights, each with AdamW's state of it."""
        return [(master, self._adamw.state[master]) for master in self._state.master_weights()]

    def _set_initial_state(self, weights: dict[str, Tensor]) -> None:
        """Set every weight, emptying ``weights``, and moments of zero."""
        for name in list(weights):
            self.set_full_param(name, weights.pop(name).to(self._topology.device))
        for _, moments in self.flat_state():
            for moment in global_state.MOMENTS:
                moments[moment].zero_()
        self.sync_params()


def _fp32_weights(module: Stage, device: torch.device) -> dict[str, Tensor]:
    """Return the weights before DeepSpeed rounds them to bf16 and builds master weights from those.

    DeepSpeed replaces the tensors, so keeping the old ones copies nothing; where it trains on the CPU it reuses some.
    """
    on_cpu = device.type == "cpu"
    return {name: weight.detach().clone() if on_cpu else weight.detach() for name, weight in module.named_parameters()}


@contextlib.contextmanager
def _barriers_within(group: ProcessGroup) -> Iterator[None]:
    """Let DeepSpeed's barriers wait for ``group`` alone: stages of other ranks may have nothing that it trains.

    It calls them as ``dist.barrier()``, which waits for the whole world.
    """
    from deepspeed import comm

    barrier = comm.barrier
    comm.barrier = functools.partial(barrier, group=group)
    try:
        yield
    finally:
        comm.barrier = barrier


class _DataParallelUnit:
    """DeepSpeed's interface to parallel groups (``mpu``), restricted to this stage's data-parallel group.

    DeepSpeed sees only the data ranks, each a model-parallel group of its own; TP and PP communication bypass it.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def get_data_parallel_group(self) -> ProcessGroup:
        return self._topology.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._topology.data_group)

    def get_data_parallel_rank(self) -> int:
        return self._topology.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._topology.data

    def get_model_parallel_group(self) -> ProcessGroup:
        return self._topology.self_group

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def _restore_buffers(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Restore the precision of buffers, which DeepSpeed casts to bf16 with the whole module."""
    for name, buffer in module.named_buffers():
        buffer.data = buffers[name].to(buffer.device)


def _deepspeed() -> Any:
    """Import deepspeed, check its version and silence its messages.

    Raises ConfigError for a version that is not tested.
    """
    if (installed := version("deepspeed")) not in TESTED_VERSIONS:
        raise ConfigError(
            f"deepspeed {installed} is installed; the engine is tested with {', '.join(TESTED_VERSIONS)}. "
            f"Run: pip install deepspeed=={TESTED_VERSIONS[-1]}"
        )
    # torch warns at each call site that the collectives DeepSpeed calls will be renamed
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather_into|reduce_scatter)_tensor.*")
    import deepspeed
    import deepspeed.ops

    # one of its optimizers, which is not used here, compiles functions at import: loading the compiler takes seconds
    with patch.object(torch, "compile", lambda function: function):
        import_module("deepspeed.runtime.zero.muon.original_muon")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # an op for inference, which would be compiled at start-up on machines without a GPU
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
