"""Forward passes alone through the stages of a pipeline engine: losses of validation, next tokens of its answers.

They run as in training: the same stages, micro-batches and messages, under a schedule without backward passes. ZeRO-3
gathers the weights once per call and partitions them again, so that weights and optimizer state stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.engine.mask_consistency import MaskConsistencyChecker
from aki_megatron.engine.pipeline_step import Mode, PipelineContext, PipelineStep
from aki_megatron.parallel.batch_broadcast import MicrobatchShape, broadcast_shapes
from aki_megatron.parallel.schedule import build_schedule
from aki_megatron.types import Batch

PHASE_PREFIX = "validation: "
"""Before the phases of these passes, as heartbeats show them."""


class PipelineInference:
    """Forward passes over the stages of one engine; every method is collective."""

    def __init__(self, context: PipelineContext, num_microbatches: int) -> None:
        """
        context           of the engine's training steps
        num_microbatches  per call and data rank
        """
        topology = context.topology
        schedules = build_schedule(
            pipeline=topology.pipeline,
            virtual_stages=len(context.stages),
            num_microbatches=num_microbatches,
            forward_only=True,
        )
        self._num_microbatches = num_microbatches
        self._context = replace(
            context, schedule=schedules[topology.pipeline_rank], set_phase=_with_prefix(context.set_phase)
        )

    def losses(self, microbatches: Sequence[Batch], *, check_masks: bool = False) -> list[float]:
        """Return the summed loss of each micro-batch; see Engine.forward_losses."""
        outputs, _ = self._run(microbatches, "loss", check_masks=check_masks)
        sizes = [1] * self._num_microbatches
        return [values[0] for values in self._share(outputs, sizes, torch.float64)]

    def next_tokens(self, microbatches: Sequence[Batch]) -> list[list[int]]:
        """Return the most likely next tokens of each micro-batch; see Engine.next_tokens."""
        outputs, shapes = self._run(microbatches, "next_tokens")
        return self._share(outputs, [shape.supervised_tokens for shape in shapes], torch.int64)

    def _run(
        self, microbatches: Sequence[Batch], mode: Mode, *, check_masks: bool = False
    ) -> tuple[dict[int, Tensor], list[MicrobatchShape]]:
        """Return what the LM head returned, on the ranks that hold it, and the shapes of the micro-batches."""
        context = replace(self._context, mode=mode)
        context.set_phase("counting tokens")
        shapes = broadcast_shapes(microbatches, self._num_microbatches, context.topology)
        checker = MaskConsistencyChecker(context.topology) if check_masks else None
        step = PipelineStep(context, microbatches, shapes, 0.0, checker)
        step.run()
        for stage in context.stages:
            stage.end_inference()
        if checker is not None:
            checker.compare()
        return step.outputs, shapes

    def _share(self, outputs: dict[int, Tensor], sizes: Sequence[int], dtype: torch.dtype) -> list[list]:
        """Return the elements of each micro-batch's output, ``sizes`` of them, on all ranks of the replica."""
        topology = self._context.topology
        self._context.set_phase("sharing results")
        shared = torch.zeros(sum(sizes), dtype=dtype, device=topology.device)
        if outputs and topology.tensor_rank == 0:  # all tensor ranks have the same
            shared = torch.cat([outputs[index].reshape(-1).to(dtype) for index in range(len(sizes))])
        if topology.tensor * topology.pipeline > 1 and len(shared):
            dist.all_reduce(shared, group=topology.replica_group)
        return [part.tolist() for part in shared.split(list(sizes))]


def _with_prefix(set_phase: Callable[[str], None]) -> Callable[[str], None]:
    return lambda phase: set_phase(f"{PHASE_PREFIX}{phase}")
