"""Interfaces: ShardedStage, one pipeline stage with its optimizer state, and Engine, which runs the stages."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.errors import UserError
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch, ControlRequest, Modality, StackedIds, StepReport

ParameterFilter = Callable[[str], bool]
"""Takes the name of a parameter in the whole model; returns whether it is meant. The same on every rank."""

MAX_SKIPPED_IN_A_ROW = 10
"""Consecutive steps without a finite gradient after which training stops."""


def every_parameter(_name: str) -> bool:
    """A ParameterFilter that leaves none out."""
    return True


class DivergedError(UserError):
    """The gradient was not finite in too many consecutive steps."""


@dataclass(frozen=True)
class GradientGroup:
    """This rank's disjoint part of the gradients of one parameter group.

    tensor_sharded  every tensor rank holds a shard of these parameters; else all tensor ranks hold the same
    tied            the first and the last stage hold the same parameters, and this part of them on both
    tensors         the gradients that the next optimizer step applies; changed in place
    """

    tensor_sharded: bool
    tied: bool
    tensors: list[Tensor]


class ShardedStage(Protocol):
    """One pipeline stage with its optimizer, whose state may be partitioned over the ranks of its data group.

    All ranks of the data group call the methods marked collective, in the same order. ``name`` is a parameter's name in
    ``module``; ``moment`` is one of global_state.MOMENTS, or None for the master weight. Parameters that require no
    gradient are frozen: they have no moments and change only by ``set_full_param``.
    """

    module: Stage

    def begin_step(self) -> None:
        """Gather the parameters for the coming step; collective."""

    def forward(self, inputs: Tensor, ids: StackedIds, media: Mapping[Modality, Tensor], mask: AttentionMask) -> Tensor:
        """Return ``module(inputs, ids, media, mask=mask)``."""
        ...

    def infer(
        self,
        inputs: Tensor,
        ids: StackedIds,
        media: Mapping[Modality, Tensor],
        mask: AttentionMask,
        *,
        next_tokens: bool,
    ) -> Tensor:
        """Return what ``forward`` does, or ``module.next_tokens``, without a graph, between two steps.

        After ``begin_step``, and before ``end_inference``.
        """
        ...

    def end_inference(self) -> None:
        """Undo ``begin_step``: no gradients and no update follow; collective."""

    def backward(self, output: Tensor, gradient: Tensor | None, *, is_last: bool) -> None:
        """Accumulate the gradients of one forward pass; collective when ``is_last``.

        output    what ``forward`` returned, or a scalar computed from it
        gradient  of the output; None where the output is a scalar to be minimized
        is_last   whether this is the stage's last backward pass of the step: average gradients over the data ranks
        """

    def gradients(self) -> list[GradientGroup]:
        """Return this rank's part of the averaged gradients, float32, after the last backward pass of a step."""
        ...

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients that the next optimizer step applies; the same factor on all ranks."""

    def optimizer_step(self, lr: float) -> None:
        """Apply the gradients by one AdamW update; collective."""

    def skip_step(self) -> None:
        """Discard the gradients instead; collective."""

    def get_full_param(self, name: str, moment: str | None = None) -> Tensor:
        """Return a master weight or moment, float32, gathered over the data ranks; collective.

        A parameter that is sharded over the tensor ranks is returned as this tensor rank holds it.
        """
        ...

    def set_full_param(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """Overwrite what ``get_full_param`` returns; call ``sync_params`` after the last of these."""

    def sync_params(self) -> None:
        """Copy the master weights to the parameters that forward passes use; collective."""

    def set_num_updates(self, counts: Mapping[int, int]) -> None:
        """Set the number of updates so far, as AdamW's bias correction counts them, by PartPlan.since."""


class Engine(Protocol):
    """Optimizer steps and state of a model under any parallel layout.

    Every method is collective: all ranks call it, in the same order.
    """

    def train_step(
        self, microbatches: Sequence[Batch], lr: float, *, control: ControlRequest = ControlRequest.NONE
    ) -> StepReport:
        """Run forward and backward passes over the micro-batches, then one optimizer step at learning rate ``lr``.

        Ranks that read data pass their micro-batches, the same number each; all others pass none. The numbers of the
        report are global. ``control`` is this rank's request; the report holds the requests of all ranks combined.

        Raises DivergedError when the gradient was not finite in MAX_SKIPPED_IN_A_ROW consecutive steps, and
        MaskMismatchError when the ranks of a replica built different attention masks.
        """
        ...

    def forward_losses(self, microbatches: Sequence[Batch], *, check_masks: bool = False) -> list[float]:
        """Return the summed loss of each of this replica's micro-batches, on all ranks of the replica.

        microbatches  as in ``train_step``, the same number of them
        check_masks   compare the attention masks of the ranks of a replica

        Forward passes alone: weights, optimizer state and random generators stay as they are.
        """
        ...

    def next_tokens(self, microbatches: Sequence[Batch]) -> list[list[int]]:
        """Return the most likely next token at each position with a target, in the order of the positions.

        Arguments and result as in ``forward_losses``: a list for each micro-batch, on all ranks of the replica.
        """
        ...

    def state_dict(self, is_included: ParameterFilter = every_parameter) -> dict[str, Tensor]:
        """Return the global state: master weights, moments and update count of this rank's stages.

        is_included  parameters whose weights and moments to return

        Names and shapes do not depend on the parallel layout. The tensors are DTensors sharded over the ranks that hold
        them; all ranks together hold the whole model.
        """
        ...

    def load_state_dict(self, tensors: Mapping[str, Tensor], is_included: ParameterFilter = every_parameter) -> None:
        """Load tensors of the form ``state_dict`` returns, saved under any layout; at any time between two steps.

        is_included  parameters that ``tensors`` has; the others keep their weights
        """
        ...

    def named_weights(self, is_included: ParameterFilter = every_parameter) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights of this rank's stages under their global names, full, float32, one at a time."""
        ...
