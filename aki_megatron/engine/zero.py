"""DeepSpeed ZeRO 1, 2 and 3 over the data ranks: the only door to deepspeed.

What it adds to an ordinary DeepSpeed engine:
- The loss is a sum until the last moment: DeepSpeed averages gradients over data ranks, so the loss is multiplied by
  data ranks / supervised tokens of the whole step.
- An exact global norm and clipping of our own, in the all-reduce that carries the loss. A gradient that is not finite
  anywhere makes all ranks skip the step.
- ZeRO-3 gathers each parameter once per step: all of them before the first micro-batch, and nothing is released until
  the step is done. DeepSpeed's hooks around each module, and with them its demand that all ranks run the same modules
  in the same order, are gone. In between steps weights are sharded, during a step they are whole.
- In bf16 the master weights start as the model's float32 weights, not as those weights rounded to bf16.

The model is built whole on every rank's CPU and handed to deepspeed.initialize, which partitions it.
Private parts of DeepSpeed are touched here and nowhere else, and only in versions proven by the equality tests.
"""

import contextlib
import io
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from aki_megatron.engine import logical
from aki_megatron.engine.base import MAX_SKIPPED_IN_A_ROW, DivergedError
from aki_megatron.engine.norm import clip_factor, squared_norm
from aki_megatron.engine.settings import deepspeed_settings
from aki_megatron.flow import Batch, ConfigError, Modality, StepReport, stack_ids
from aki_megatron.parallel.topology import Topology

PROVEN_VERSIONS = ("0.19.8",)
"""DeepSpeed versions whose private parts used here are known to be right."""

GATHER_ELEMENTS = 2**27
"""Most elements of one all-gather of parameters; bounds the memory of its buffer."""


class ZeroEngine:
    """Engine over data-parallel ranks; see aki_megatron.engine.base.Engine."""

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        optimizer: torch.optim.AdamW,
        *,
        zero_stage: Literal[1, 2, 3],
        precision: Literal["bf16", "fp32"],
        clip_norm: float,
        deepspeed_config: Mapping[str, Any],
    ) -> None:
        """Wrap ``model`` (float32, on the CPU, same weights on every rank); it is partitioned in place.

        optimizer         over the trainable parameters of the model
        clip_norm         limit of the global gradient norm
        deepspeed_config  further DeepSpeed settings in its own format; what the run decides overrides them

        Errors: ConfigError for settings or versions of DeepSpeed that are not proven.
        """
        self._deepspeed = _deepspeed()
        self._topology = topology
        self._clip_norm = clip_norm
        self._adamw = optimizer
        self._zero_stage = zero_stage
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._skipped_in_a_row = 0
        self._mesh = DeviceMesh.from_group(topology.data_group, topology.device.type)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        exact = self._exact_weights(model)
        assert all(parameter.dim() for parameter in model.parameters()), "DeepSpeed cannot broadcast a scalar parameter"
        settings = deepspeed_settings(deepspeed_config, zero_stage=zero_stage, precision=precision, ranks=topology.data)
        with contextlib.redirect_stdout(io.StringIO()):  # one of its optimizers prints memory tables
            self._engine, self._optimizer, _, _ = self._deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings
            )
        _restore_buffers(model, buffers)
        self._parameters = dict(model.named_parameters())
        self._partitions = _partitions(self._optimizer, list(self._parameters.values()))
        self._create_moments()
        for name in list(exact):
            self._put(self._parameters[name], logical.gather(exact.pop(name)))
        self._partitions.refresh()

    def train_step(self, microbatches: Sequence[Batch], lr: float) -> StepReport:
        """One optimizer step; see Engine.train_step.

        Errors: DivergedError when the gradient was not finite in MAX_SKIPPED_IN_A_ROW steps in a row.
        """
        assert microbatches, "a step needs at least one micro-batch per rank"
        started = time.perf_counter()
        counts = [
            [b.supervised_tokens, int((b.modality_ids != Modality.PAD).sum()), len(b.pixels)] for b in microbatches
        ]
        supervised, tokens, images = self._topology.sum_over_data([sum(column) for column in zip(*counts, strict=True)])
        loss = self._accumulate(microbatches, supervised)
        gradients = self._partitions.gradients()
        sums = torch.stack([loss.double(), squared_norm(gradients, self._topology.device)])
        dist.all_reduce(sums, group=self._topology.data_group)
        loss_sum, square = sums.tolist()
        norm = math.sqrt(square) if math.isfinite(square) else math.inf
        skipped = not math.isfinite(norm)
        if skipped:
            self._partitions.discard()
        else:
            self._update(gradients, norm, lr)
        self._count_skipped(skipped)
        return StepReport(
            loss=loss_sum / max(supervised, 1),
            grad_norm=norm,
            lr=lr,
            supervised_tokens=int(supervised),
            tokens=int(tokens),
            images=int(images),
            seconds=time.perf_counter() - started,
            skipped=skipped,
        )

    def _accumulate(self, microbatches: Sequence[Batch], supervised: float) -> Tensor:
        """Forward and backward over all micro-batches. Returns this rank's summed loss; gradients are of the mean."""
        # DeepSpeed averages gradients over data ranks; multiply that average away
        scale = self._topology.data / max(supervised, 1)
        total = torch.zeros((), device=self._topology.device)
        self._partitions.gather()
        for index, batch in enumerate(microbatches):
            batch = batch.to(self._topology.device)
            self._engine.set_gradient_accumulation_boundary(index == len(microbatches) - 1)
            loss = self._engine(batch.token_ids, stack_ids(batch), batch.pixels.to(self._dtype))
            # the flag is otherwise cleared by forward alone, which a pipeline does not run between two backwards
            self._optimizer.clear_backward_seen_flag()
            self._engine.backward(loss * scale)
            total += loss.detach()
        return total

    def _update(self, gradients: list[Tensor], norm: float, lr: float) -> None:
        factor = clip_factor(norm, self._clip_norm)
        if factor < 1.0:
            torch._foreach_mul_(gradients, factor)
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._engine.step()

    def _count_skipped(self, skipped: bool) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"The gradient was not finite in {self._skipped_in_a_row} steps in a row: training has diverged. Lower "
                "optimizer.lr, lengthen optimizer.warmup_steps, or look at the data, and resume from a checkpoint."
            )

    def state(self) -> dict[str, Tensor]:
        """Master weights, moments and step; frozen parameters have a weight only. See Engine.state."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[logical.key(logical.WEIGHT, name)] = logical.shard_rows(self._whole(parameter), self._mesh)
            for moment in logical.MOMENTS if parameter.requires_grad else ():
                tensors[logical.key(moment, name)] = logical.shard_rows(self._whole(parameter, moment), self._mesh)
        tensors[logical.STEP] = self._adamw.state[self._partitions.masters()[0]]["step"].detach().clone().cpu()
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """See Engine.load_state. The tensors hold exactly the names ``state`` returns."""
        for name, parameter in self._parameters.items():
            self._put(parameter, logical.gather(tensors[logical.key(logical.WEIGHT, name)]))
            for moment in logical.MOMENTS if parameter.requires_grad else ():
                self._put(parameter, logical.gather(tensors[logical.key(moment, name)]), moment)
        for master in self._partitions.masters():
            self._adamw.state[master]["step"].fill_(float(tensors[logical.STEP]))
        self._partitions.refresh()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See Engine.weights."""
        for name, parameter in self._parameters.items():
            yield name, self._whole(parameter)

    def _whole(self, parameter: nn.Parameter, moment: str | None = None) -> Tensor:
        """Master weight or moment of one parameter, whole and float32; collective."""
        if not parameter.requires_grad:
            with self._deepspeed.zero.GatheredParameters([parameter], enabled=self._zero_stage == 3):
                return parameter.detach().float().clone()
        if moment is None:
            return self._deepspeed.utils.safe_get_full_fp32_param(parameter).detach()
        return self._deepspeed.utils.safe_get_full_optimizer_state(parameter, moment).detach()

    def _put(self, parameter: nn.Parameter, whole: Tensor, moment: str | None = None) -> None:
        """Overwrite this rank's part of a master weight or moment."""
        utils = self._deepspeed.utils
        if self._zero_stage != 3:
            if not parameter.requires_grad:
                parameter.data.copy_(whole)
            elif moment is None:
                utils.safe_set_full_fp32_param(parameter, whole)
            else:
                utils.safe_set_full_optimizer_state(parameter, whole, moment)
            return
        partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        share = logical.flat_share(whole, partition.numel(), self._topology.data_rank)
        if not parameter.requires_grad:
            partition.data.copy_(share.view_as(partition))
        elif moment is None:
            utils.safe_set_local_fp32_param(parameter, share)
        else:
            utils.safe_set_local_optimizer_state(parameter, share, moment)

    def _exact_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Trainable weights before DeepSpeed rounds them to bf16 and makes master weights of the rounded ones."""
        if self._dtype == torch.float32:
            return {}
        named = [(name, weight.detach()) for name, weight in model.named_parameters() if weight.requires_grad]
        return {name: logical.shard_rows(weight.to(self._topology.device), self._mesh) for name, weight in named}

    def _create_moments(self) -> None:
        """AdamW creates its state in the first step; a checkpoint may be loaded or saved before that."""
        for master in self._partitions.masters():
            state = self._adamw.state[master]
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in logical.MOMENTS:
                state[moment] = torch.zeros_like(master, requires_grad=False)
        if self._zero_stage != 3:
            self._optimizer._lazy_init_hp_params_optimizer_state()


class _Partitions:
    """What our arithmetic needs from one of DeepSpeed's optimizers: this rank's disjoint share of the state.

    This one is ZeRO-2, and ZeRO-1 unless weights are bf16.
    """

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._optimizer = optimizer

    def gradients(self) -> list[Tensor]:
        """Averaged gradients of this rank's share; changed in place, they are what the next step applies."""
        return [gradient for group in self._optimizer.averaged_gradients.values() for gradient in group]

    def gather(self) -> None:
        """Have the weights whole for the coming step: in ZeRO 1 and 2 they are."""

    def masters(self) -> list[Tensor]:
        """Flat float32 master weights."""
        return self._optimizer.single_partition_of_fp32_groups

    def discard(self) -> None:
        """Forget the accumulated gradients: a skipped step."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer._release_preflattened_grad_buffers()
        for group in self._optimizer.averaged_gradients:
            self._optimizer.averaged_gradients[group] = None
            self._optimizer.all_grad_tensors[group] = None

    def refresh(self) -> None:
        """Copy master weights into the weights that forward uses."""
        self._optimizer.update_lp_params()


class _Stage3Partitions(_Partitions):
    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        self._chunks = _chunks(parameters)
        # its own norm costs an all-reduce per sub-group and is not used: clipping and skipping are decided here
        optimizer._get_norm_groups = lambda: [torch.zeros(())]
        # with every parameter whole during the step, hooks around each module's forward and backward have nothing to do
        optimizer.parameter_offload._remove_module_hooks()

    def gather(self) -> None:
        for chunk in self._chunks:
            chunk[0].all_gather_coalesced(chunk).wait()

    def masters(self) -> list[Tensor]:
        return self._optimizer.fp32_partitioned_groups_flat

    def discard(self) -> None:
        self._optimizer._pre_step()
        self._optimizer._partition_all_parameters()
        self._optimizer._overflow_clean_up(None)

    def refresh(self) -> None:
        for sub_group in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)


class _Bf16Stage1Partitions(_Partitions):
    """DeepSpeed runs ZeRO-1 with bf16 weights and fp32 accumulation by a class of its own."""

    def gradients(self) -> list[Tensor]:
        return self._optimizer.fp32_groups_gradient_flat_partition

    def masters(self) -> list[Tensor]:
        return self._optimizer.fp32_groups_flat_partition

    def discard(self) -> None:
        self._optimizer.clear_hp_grads()
        self._optimizer.clear_lp_grads()


def _chunks(parameters: Sequence[Any]) -> list[list[Any]]:
    """Parameters cut into runs of about GATHER_ELEMENTS elements."""
    chunks: list[list[Any]] = [[]]
    elements = 0
    for parameter in parameters:
        if elements >= GATHER_ELEMENTS:
            chunks.append([])
            elements = 0
        chunks[-1].append(parameter)
        elements += parameter.ds_numel
    return chunks


PARTITIONS = {
    "DeepSpeedZeroOptimizer": _Partitions,
    "DeepSpeedZeroOptimizer_Stage3": _Stage3Partitions,
    "BF16_Optimizer": _Bf16Stage1Partitions,
}


def _partitions(optimizer: Any, parameters: Sequence[nn.Parameter]) -> _Partitions:
    name = type(optimizer).__name__
    if name not in PARTITIONS:
        raise ConfigError(
            f"The DeepSpeed settings lead to its optimizer {name}; proven are {', '.join(PARTITIONS)}. Remove the "
            "setting that asks for it from the file given to --ds_config."
        )
    return PARTITIONS[name](optimizer, parameters)


def _restore_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Give buffers back the precision that DeepSpeed's cast of the whole module to bf16 took from them."""
    for name, buffer in model.named_buffers():
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
