"""What every engine does: one optimizer step over a share of a batch, and its state as logical tensors."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from aki_megatron.flow import Batch, StepReport, UserError

MAX_SKIPPED_IN_A_ROW = 10
"""Steps without a finite gradient, one after another, after which training stops."""


class DivergedError(UserError):
    """The gradient was not finite too often in a row."""


class Engine(Protocol):
    """One optimizer step, however the model is spread.

    Every method is collective: all ranks call it, in the same order.
    """

    def train_step(self, microbatches: Sequence[Batch], lr: float) -> StepReport:
        """Forward and backward over this rank's micro-batches, then one optimizer step at learning rate ``lr``.

        Every rank gives the same number of micro-batches. The report's numbers are global.
        """
        ...

    def state(self) -> dict[str, Tensor]:
        """Logical tensors to be saved, DTensors sharded over the data ranks; names do not depend on the layout."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over tensors of the form ``state`` returns, saved under any layout."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by parameter name, whole, float32, one at a time."""
        ...
