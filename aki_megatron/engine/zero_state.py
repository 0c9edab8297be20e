"""What a pipeline stage needs from each of DeepSpeed's optimizers: this rank's disjoint share of the state.

Only attributes of optimizers that zero.py was handed are touched here; they are private ones, and right in the versions
that zero.py lets through.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aki_megatron.errors import ConfigError

GATHER_ELEMENTS = 2**27
"""Most elements of one all-gather of parameters; bounds the memory of its buffer."""


class Partitions:
    """ZeRO-2, and ZeRO-1 unless weights are bf16."""

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._optimizer = optimizer

    def gradients(self) -> list[list[Tensor]]:
        """Averaged gradients of this rank's share, by parameter group; what the next step applies."""
        averaged = self._optimizer.averaged_gradients
        return [list(averaged[group]) for group in range(len(averaged))]

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

    def link_moments(self) -> None:
        """Let parameters find their moments before the first step has made them."""
        self._optimizer._lazy_init_hp_params_optimizer_state()


class _Offloaded(Partitions):
    """ZeRO-2 with masters, moments and their gradients in the host's memory."""

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        # here its own norm cannot be switched off by a setting; clipping and skipping are decided elsewhere
        optimizer.scaled_global_norm = lambda norm_type=2: torch.zeros(())

    def gradients(self) -> list[list[Tensor]]:
        self._optimizer._wait_for_offload_copies()
        return [[_gradient(master)] for master in self.masters()]

    def discard(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        optimizer.averaged_gradients = {}
        # the next backward pass is the first of a step again: it overwrites instead of adding
        optimizer.micro_step_id = -1
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()


class _Stage3(Partitions):
    """ZeRO-3. A parameter group may be cut into several sub-groups, each with a master of its own."""

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        self._chunks = _chunks(parameters)
        # its own norm costs an all-reduce per sub-group and is not used: clipping and skipping are decided elsewhere
        optimizer._get_norm_groups = lambda: [torch.zeros(())]
        # with every parameter whole during the step, callbacks around each module's forward and backward have nothing to do
        optimizer.parameter_offload._remove_module_hooks()

    def gradients(self) -> list[list[Tensor]]:
        sub_groups = self._optimizer.sub_group_to_group_id
        groups: list[list[Tensor]] = [[] for _ in set(sub_groups.values())]
        for sub_group, group in sorted(sub_groups.items()):
            groups[group] += self._of_sub_group(sub_group)
        return groups

    def _of_sub_group(self, sub_group: int) -> list[Tensor]:
        return self._optimizer.averaged_gradients[sub_group]

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

    def link_moments(self) -> None:
        pass  # it looks them up by the master each time


class _OffloadedStage3(_Stage3):
    """ZeRO-3 with masters, moments and their gradients in the host's memory."""

    def _of_sub_group(self, sub_group: int) -> list[Tensor]:
        return [_gradient(self.masters()[sub_group])]


class _Bf16Stage1(Partitions):
    """DeepSpeed runs ZeRO-1 with bf16 weights and fp32 accumulation by a class of its own."""

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        # its own norm runs over the gradients of all data ranks and is not used
        optimizer.get_grads_for_norm = lambda for_clipping=False: ([self.masters()[0].new_zeros(1)], {})

    def gradients(self) -> list[list[Tensor]]:
        return [[gradient] for gradient in self._optimizer.fp32_groups_gradient_flat_partition]

    def masters(self) -> list[Tensor]:
        return self._optimizer.fp32_groups_flat_partition

    def discard(self) -> None:
        self._optimizer.clear_hp_grads()
        self._optimizer.clear_lp_grads()


def _gradient(master: Tensor) -> Tensor:
    """Where an offloaded master gets its gradient from; DeepSpeed keeps one buffer for the whole run."""
    assert master.grad is not None
    return master.grad


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


PARTITIONS: dict[tuple[str, bool], type[Partitions]] = {
    ("DeepSpeedZeroOptimizer", False): Partitions,
    ("DeepSpeedZeroOptimizer", True): _Offloaded,
    ("DeepSpeedZeroOptimizer_Stage3", False): _Stage3,
    ("DeepSpeedZeroOptimizer_Stage3", True): _OffloadedStage3,
    ("BF16_Optimizer", False): _Bf16Stage1,
}
"""DeepSpeed's class and whether its state is offloaded -> ours."""


def partitions_of(optimizer: Any, parameters: Sequence[nn.Parameter]) -> Partitions:
    """How to reach the state of ``optimizer``, over the stage's ``parameters``.

    Errors: ConfigError for an optimizer of DeepSpeed's that is not proven.
    """
    offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    name = type(optimizer).__name__
    if (name, offloaded) not in PARTITIONS:
        raise ConfigError(
            f"The DeepSpeed settings lead to its optimizer {name}; proven are "
            f"{', '.join(sorted({name for name, _ in PARTITIONS}))}. Remove the setting that asks for it from the file "
            "given to --ds_config."
        )
    return PARTITIONS[name, offloaded](optimizer, parameters)
