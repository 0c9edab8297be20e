"""One pipeline stage under DeepSpeed ZeRO 1, 2 or 3 over its data ranks: the only door to deepspeed.

What it adds to an ordinary DeepSpeed engine:
- Forward and backward passes in any order that a pipeline schedule asks for, several of one before the other.
- Averaged gradients are handed out for an exact global norm, clipping and skipping of our own; DeepSpeed's own norm,
  clipping and checks are off, so that nothing of DeepSpeed's communicates beyond the data ranks of the stage.
- ZeRO-3 gathers each parameter once per step: all of them before the first micro-batch, and nothing is released until
  the step is done. DeepSpeed's callbacks around each module, and with them its demand that all ranks of the world run the
  same modules in the same order, are gone. In between steps weights are sharded, during a step they are whole.
- In bf16 the master weights start as the stage's float32 weights, not as those weights rounded to bf16.

The stage is built whole on every rank's CPU and handed to deepspeed.initialize, which partitions it.
Private parts of DeepSpeed are touched here and in partitions.py, and only in versions proven by the equality tests.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from aki_megatron.attention import AttentionMask
from aki_megatron.engine import global_state
from aki_megatron.engine.base import GradientGroup
from aki_megatron.engine.settings import deepspeed_settings
from aki_megatron.engine.zero_state import partitions_of
from aki_megatron.errors import ConfigError
from aki_megatron.model.stage import Stage
from aki_megatron.parallel.topology import Topology

PROVEN_VERSIONS = ("0.19.8",)
"""DeepSpeed versions whose private parts used here are known to be right."""


class ZeroStage:
    """A stage runner under DeepSpeed; see aki_megatron.engine.base.ShardedStage."""

    def __init__(
        self,
        stage: Stage,
        topology: Topology,
        optimizer: torch.optim.AdamW,
        *,
        zero_stage: Literal[1, 2, 3],
        precision: Literal["bf16", "fp32"],
        deepspeed_config: Mapping[str, Any],
    ) -> None:
        """Wrap ``stage`` (float32, on the CPU, same weights on every data rank), which is partitioned in place.

        Collective. Every rank of the world makes equally many of these, for DeepSpeed lets them wait for each other.

        optimizer         over the trainable parameters, in the groups that optimizer.parameter_groups makes
        deepspeed_config  further DeepSpeed settings in its own format; what the run decides overrides them

        Errors: ConfigError for settings or versions of DeepSpeed that are not proven.
        """
        self.stage = stage
        self._deepspeed = _deepspeed()
        self._topology = topology
        self._adamw = optimizer
        self._zero_stage = zero_stage
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._flags = [(group["split"], group["tied"]) for group in optimizer.param_groups]
        buffers = {name: buffer.clone() for name, buffer in stage.named_buffers()}
        exact = self._exact_weights()
        assert all(parameter.dim() for parameter in stage.parameters()), "DeepSpeed cannot broadcast a scalar parameter"
        settings = deepspeed_settings(deepspeed_config, zero_stage=zero_stage, precision=precision, ranks=topology.data)
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints memory tables
            self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
                model=stage, optimizer=optimizer, config=settings, mpu=_DataRanks(topology)
            )
        _restore_buffers(stage, buffers)
        self._parameters = dict(stage.named_parameters())
        self._partitions = partitions_of(self._optimizer, list(self._parameters.values()))
        self._create_moments()
        for name in list(exact):
            self.put(name, exact.pop(name).to(topology.device))
        self.refresh()

    def begin_step(self) -> None:
        """See ShardedStage.begin_step."""
        self._partitions.gather()

    def forward(self, inputs: Tensor, ids: Tensor, pixels: Tensor | None, layout: AttentionMask) -> Tensor:
        """See ShardedStage.forward."""
        return self._engine(inputs, ids, None if pixels is None else pixels.to(self._dtype), layout=layout)

    def backward(self, output: Tensor, gradient: Tensor | None, *, last: bool) -> None:
        """See ShardedStage.backward."""
        self._engine.set_gradient_accumulation_boundary(last)
        # the flag is otherwise cleared by forward alone, which a pipeline does not run between two backward passes
        self._optimizer.clear_backward_seen_flag()
        if gradient is None:
            self._engine.backward(output)
        else:
            output.backward(gradient)

    def gradients(self) -> list[GradientGroup]:
        """See ShardedStage.gradients. With offloading the tensors are in the host's memory."""
        pieces = self._partitions.gradients()
        return [GradientGroup(split, tied, tensors) for (split, tied), tensors in zip(self._flags, pieces, strict=True)]

    def scale_gradients(self, factor: float) -> None:
        """See ShardedStage.scale_gradients."""
        torch._foreach_mul_([tensor for group in self.gradients() for tensor in group.tensors], factor)

    def update(self, lr: float) -> None:
        """See ShardedStage.update."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._engine.step()

    def discard(self) -> None:
        """See ShardedStage.discard."""
        self._partitions.discard()

    def local(self, name: str, moment: str | None = None) -> Tensor:
        """See ShardedStage.local."""
        parameter = self._parameters[name]
        if not parameter.requires_grad:
            with self._deepspeed.zero.GatheredParameters([parameter], enabled=self._zero_stage == 3):
                return parameter.detach().float().clone()
        if moment is None:
            return self._deepspeed.utils.safe_get_full_fp32_param(parameter).detach()
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, moment).detach()

    def put(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """See ShardedStage.put."""
        parameter, utils = self._parameters[name], self._deepspeed.utils
        if self._zero_stage != 3:
            if not parameter.requires_grad:
                parameter.data.copy_(value)
            elif moment is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, moment)
            return
        partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        share = global_state.flat_share(value, partition.numel(), self._topology.data_rank)
        if not parameter.requires_grad:
            partition.data.copy_(share.view_as(partition))
        elif moment is None:
            utils.safe_set_local_fp32_param(parameter, share)
        else:
            utils.safe_set_local_optimizer_state(parameter, share, moment)

    def refresh(self) -> None:
        """See ShardedStage.refresh."""
        self._partitions.refresh()

    @property
    def updates(self) -> int:
        """See ShardedStage.updates."""
        return int(self._adamw.state[self._partitions.masters()[0]]["step"])

    @updates.setter
    def updates(self, count: int) -> None:
        for master in self._partitions.masters():
            self._adamw.state[master]["step"].fill_(float(count))

    def _exact_weights(self) -> dict[str, Tensor]:
        """Trainable weights before DeepSpeed rounds them to bf16 and makes master weights of the rounded ones.

        It puts rounded tensors in their place, so keeping the old ones copies nothing.
        """
        if self._dtype == torch.float32:
            return {}
        return {name: weight.detach() for name, weight in self.stage.named_parameters() if weight.requires_grad}

    def _create_moments(self) -> None:
        """AdamW creates its state in the first step; a checkpoint may be loaded or saved before that."""
        fused = bool(self._adamw.defaults["fused"])
        for master in self._partitions.masters():
            state = self._adamw.state[master]
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if fused else None)
            for moment in global_state.MOMENTS:
                state[moment] = torch.zeros_like(master, requires_grad=False)
        self._partitions.link_moments()


class _DataRanks:
    """What DeepSpeed is told of the world: the data ranks of this stage, each a model parallel group of its own.

    That stages and slices of layers lie elsewhere is none of its business; what crosses them does so outside of it.
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


def _restore_buffers(stage: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Give buffers back the precision that DeepSpeed's cast of the whole module to bf16 took from them."""
    for name, buffer in stage.named_buffers():
        buffer.data = buffers[name].to(buffer.device)


def _deepspeed() -> Any:
    """The deepspeed package, checked and quietened.

    Errors: ConfigError for a version that is not proven.
    """
    if (installed := version("deepspeed")) not in PROVEN_VERSIONS:
        raise ConfigError(
            f"deepspeed {installed} is installed; the engine is proven with {', '.join(PROVEN_VERSIONS)}. "
            f"Run: pip install deepspeed=={PROVEN_VERSIONS[-1]}"
        )
    # torch announces that the collectives DeepSpeed calls will be renamed, once per call site
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather_into|reduce_scatter)_tensor.*")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # an op for inference that would be compiled at start-up on machines without a GPU
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
