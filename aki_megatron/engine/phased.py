"""An engine whose trainable parameters change from one phase of a run to the next.

At a phase border the engine is built anew, because optimizer state exists for what trains only: weights stay, a part
that goes on training keeps its moments and its number of updates, and one that begins has zeros.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from aki_megatron.config.trainable import TrainingPlan
from aki_megatron.engine import global_state
from aki_megatron.engine.base import Engine, ParameterFilter, every_parameter
from aki_megatron.model.trainable import part_plan
from aki_megatron.types import Batch, ControlRequest, StepReport


class PhasedEngine:
    """Engine (see engine/base.py) that holds the engine of one phase at a time.

    phase  whose plan the present engine trains by
    """

    def __init__(
        self, engine: Engine, plans: Sequence[TrainingPlan], phase: int, *, rebuild: Callable[[int], Engine]
    ) -> None:
        """
        engine   of phase ``phase``
        plans    of all phases
        rebuild  builds the engine of a phase, with any weights; collective
        """
        self._engine: Engine | None = engine
        self._plans = plans
        self._rebuild = rebuild
        self.phase = phase

    def trains_alike(self, phase: int) -> bool:
        """Return whether a phase trains what the present one does, so that the engine stays."""
        return self._plans[phase] == self._plans[self.phase]

    def enter_phase(self, phase: int) -> None:
        """Go on with what ``phase`` trains; between two steps."""
        if not self.trains_alike(phase):
            old = {name: tensor.to("cpu") for name, tensor in self._present.state_dict().items()}
            plan_before = self._plans[self.phase]
            self._replace(phase)
            tensors = self._present.state_dict()
            for name, tensor in tensors.items():
                if name in old and is_carried(name, plan_before, self._plans[phase]):
                    tensors[name] = old.pop(name).to(tensor.device)
            self._present.load_state_dict(tensors)
        self.phase = phase

    def select_phase(self, phase: int, keeps: ParameterFilter | None = None) -> None:
        """Get ready for ``load_state_dict`` with the state of a phase; the present state is lost where it differs.

        keeps  parameters whose weights stay, because that state leaves them out; None: none
        """
        if not self.trains_alike(phase):
            if keeps is None:
                self._replace(phase)
            else:
                old = {name: tensor.to("cpu") for name, tensor in self._present.state_dict(keeps).items()}
                self._replace(phase)
                tensors = self._present.state_dict(keeps)
                for name in sorted(tensors.keys() & old.keys()):
                    tensors[name] = old.pop(name).to(tensors[name].device)
                self._present.load_state_dict(tensors, keeps)
        self.phase = phase

    def train_step(
        self, microbatches: Sequence[Batch], lr: float, *, control: ControlRequest = ControlRequest.NONE
    ) -> StepReport:
        return self._present.train_step(microbatches, lr, control=control)

    def forward_losses(self, microbatches: Sequence[Batch], *, check_masks: bool = False) -> list[float]:
        return self._present.forward_losses(microbatches, check_masks=check_masks)

    def next_tokens(self, microbatches: Sequence[Batch]) -> list[list[int]]:
        return self._present.next_tokens(microbatches)

    def state_dict(self, is_included: ParameterFilter = every_parameter) -> dict[str, Tensor]:
        return self._present.state_dict(is_included)

    def load_state_dict(self, tensors: Mapping[str, Tensor], is_included: ParameterFilter = every_parameter) -> None:
        self._present.load_state_dict(tensors, is_included)

    def named_weights(self, is_included: ParameterFilter = every_parameter) -> Iterator[tuple[str, Tensor]]:
        return self._present.named_weights(is_included)

    @property
    def _present(self) -> Engine:
        assert self._engine is not None, "an earlier change of phase failed"
        return self._engine

    def _replace(self, phase: int) -> None:
        self._engine = None
        gc.unfreeze()  # what was built at start is left out of garbage collection
        gc.collect()  # optimizers and hooks refer to each other; two engines may not fit into memory
        self._engine = self._rebuild(phase)
        gc.collect()
        gc.freeze()


def is_carried(key: str, before: TrainingPlan, after: TrainingPlan) -> bool:
    """Return whether a tensor of the global state goes over to another plan: all but moments that begin anew."""
    kind, _, parameter = key.partition(".")
    if kind not in global_state.MOMENTS:
        return True
    return part_plan(parameter, before).since == part_plan(parameter, after).since
