"""What every engine does: one optimizer step over a share of a batch, and its state as logical tensors.

A stage runner is what one pipeline stage needs of whoever holds its optimizer state; the engine drives the runners.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.errors import UserError
from aki_megatron.model.stage import Stage
from aki_megatron.types import Batch, ControlRequest, StepReport

MAX_SKIPPED_IN_A_ROW = 10
"""Steps without a finite gradient, one after another, after which training stops."""


class DivergedError(UserError):
    """The gradient was not finite too often in a row."""


@dataclass(frozen=True)
class GradientGroup:
    """This rank's disjoint pieces of the gradients of one parameter group.

    split    every tensor rank has a share of these parameters, else all have the same
    tied     the first and the last stage have the same parameters; the pieces lie alike on both
    tensors  changed in place, they are what the next update applies
    """

    split: bool
    tied: bool
    tensors: list[Tensor]


class ShardedStage(Protocol):
    """One pipeline stage with its optimizer, over the ranks of a data group.

    Methods marked collective are called by all ranks of the data group, in the same order. ``name`` is a parameter's
    name in ``stage``; moments are global_state.MOMENTS.
    """

    stage: Stage

    def begin_step(self) -> None:
        """Have the weights whole for the coming step; collective."""

    def forward(self, inputs: Tensor, ids: Tensor, pixels: Tensor | None, layout: AttentionMask) -> Tensor:
        """``stage(inputs, ids, pixels, layout=layout)``."""
        ...

    def backward(self, output: Tensor, gradient: Tensor | None, *, last: bool) -> None:
        """Accumulate gradients of one forward pass, averaged over data ranks once ``last``; collective.

        output    what ``forward`` returned, or a scalar made of it
        gradient  of the output; None where the output is a scalar to be minimized
        last      no further backward pass of this stage in this step
        """

    def gradients(self) -> list[GradientGroup]:
        """This rank's share of the averaged gradients, float32, after the last backward pass of a step."""
        ...

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradients that the next update applies: clipping; the same factor on all ranks."""

    def update(self, lr: float) -> None:
        """One AdamW step with the gradients as they are now; collective."""

    def discard(self) -> None:
        """Forget the gradients instead: a skipped step; collective."""

    def local(self, name: str, moment: str | None = None) -> Tensor:
        """Master weight or moment as this tensor rank holds it, float32, gathered over the data ranks; collective."""
        ...

    def put(self, name: str, value: Tensor, moment: str | None = None) -> None:
        """Overwrite what ``local`` returns; call ``refresh`` when all is put."""

    def refresh(self) -> None:
        """Let forward passes use the master weights that were put; collective."""

    @property
    def updates(self) -> int:
        """Optimizer updates so far, as AdamW's bias correction counts them."""
        ...

    @updates.setter
    def updates(self, count: int) -> None: ...


class Engine(Protocol):
    """One optimizer step, however the model is spread.

    Every method is collective: all ranks call it, in the same order.
    """

    def train_step(
        self, microbatches: Sequence[Batch], lr: float, *, wish: ControlRequest = ControlRequest.NONE
    ) -> StepReport:
        """Forward and backward over the micro-batches, then one optimizer step at learning rate ``lr``.

        Ranks that read data give their share, the same number of micro-batches each, all others none. The report's
        numbers are global. ``wish`` is what this rank wants done after the step; the report's holds the control_signals of all.

        Errors: DivergedError when the gradient was not finite in MAX_SKIPPED_IN_A_ROW steps in a row,
        MaskMismatchError when the ranks of a replica have not built the same attention layout.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Logical tensors of this rank's stages, DTensors sharded over the ranks that hold them.

        Names and shapes do not depend on the layout; together the ranks hold the whole model.
        """
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors of the form ``state`` returns, saved under any layout; at any time between two steps."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight of this rank's stages by logical name, whole, float32, one at a time."""
        ...
