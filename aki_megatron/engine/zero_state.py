"""Access to the partitioned state of DeepSpeed's ZeRO optimizers: this rank's disjoint part of it.

Only attributes of optimizers that zero_stage.py created are used here. They are private, and known to be right in the
versions that zero_stage.py accepts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aki_megatron.errors import ConfigError

GATHER_ELEMENTS = 2**27
"""Most elements in one all-gather of parameters; bounds the memory of its buffer."""


class ZeroState:
    """State of ZeRO-2, and of ZeRO-1 unless weights are bf16."""

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        self._optimizer = optimizer

    def gradients(self) -> list[list[Tensor]]:
        """Return the averaged gradients of this rank's partition by parameter group, which the next step applies."""
        averaged = self._optimizer.averaged_gradients
        return [list(averaged[group]) for group in range(len(averaged))]

    def gather_params(self) -> None:
        """Gather the parameters for the coming step; in ZeRO 1 and 2 they are not partitioned."""

    def partition_params(self) -> None:
        """Undo ``gather_params``."""

    @contextmanager
    def gathered_params(self) -> Iterator[None]:
        """Gather the parameters and partition them again."""
        self.gather_params()
        yield
        self.partition_params()

    def master_weights(self) -> list[Tensor]:
        """Return the flat float32 master weights of this rank's partition."""
        return self._optimizer.single_partition_of_fp32_groups

    def master_groups(self) -> list[int]:
        """Return the parameter group of each master weight."""
        return list(range(len(self.master_weights())))

    def discard_gradients(self) -> None:
        """Discard the accumulated gradients of a skipped step."""
        self._optimizer.zero_grad(set_to_none=True)
        self._optimizer._release_preflattened_grad_buffers()
        for group in self._optimizer.averaged_gradients:
            self._optimizer.averaged_gradients[group] = None
            self._optimizer.all_grad_tensors[group] = None

    def sync_params(self) -> None:
        """Copy the master weights to the parameters that forward passes use."""
        self._optimizer.update_lp_params()

    def link_moments(self) -> None:
        """Let DeepSpeed's parameters refer to their moments, which it does only after the first step."""
        self._optimizer._lazy_init_hp_params_optimizer_state()


class _OffloadedZeroState(ZeroState):
    """ZeRO-2 with master weights, moments and their gradients in host memory."""

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        # no setting switches DeepSpeed's own norm off here; clipping and skipping are decided by our engine
        optimizer.scaled_global_norm = lambda norm_type=2: torch.zeros(())

    def gradients(self) -> list[list[Tensor]]:
        self._optimizer._wait_for_offload_copies()
        return [[_gradient(master)] for master in self.master_weights()]

    def discard_gradients(self) -> None:
        optimizer = self._optimizer
        optimizer.zero_grad(set_to_none=True)
        optimizer._release_preflattened_grad_buffers()
        optimizer.averaged_gradients = {}
        # the next backward pass is the first of a step again: it overwrites instead of adding
        optimizer.micro_step_id = -1
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()


class _Zero3State(ZeroState):
    """ZeRO-3. A parameter group may be split into several sub-groups, each with a master weight of its own."""

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        self._gather_buckets = _buckets(parameters)
        # DeepSpeed's norm costs an all-reduce per sub-group and is not used: our engine decides clipping and skipping
        optimizer._get_norm_groups = lambda: [torch.zeros(())]
        # all parameters are gathered for the whole step, so hooks around each module's passes have nothing to do
        optimizer.parameter_offload._remove_module_hooks()

    def gradients(self) -> list[list[Tensor]]:
        sub_groups = self._optimizer.sub_group_to_group_id
        groups: list[list[Tensor]] = [[] for _ in set(sub_groups.values())]
        for sub_group, group in sorted(sub_groups.items()):
            groups[group] += self._sub_group_gradients(sub_group)
        return groups

    def _sub_group_gradients(self, sub_group: int) -> list[Tensor]:
        return self._optimizer.averaged_gradients[sub_group]

    def gather_params(self) -> None:
        for bucket in self._gather_buckets:
            bucket[0].all_gather_coalesced(bucket).wait()

    def partition_params(self) -> None:
        self._optimizer._partition_all_parameters()

    def master_weights(self) -> list[Tensor]:
        return self._optimizer.fp32_partitioned_groups_flat

    def master_groups(self) -> list[int]:
        sub_groups = self._optimizer.sub_group_to_group_id
        return [sub_groups[number] for number in range(len(self.master_weights()))]

    def discard_gradients(self) -> None:
        self._optimizer._pre_step()
        self.partition_params()
        self._optimizer._overflow_clean_up(None)

    def sync_params(self) -> None:
        for sub_group in range(len(self._optimizer.fp16_groups)):
            self._optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)

    def link_moments(self) -> None:
        pass  # DeepSpeed looks them up by the master weight each time


class _OffloadedZero3State(_Zero3State):
    """ZeRO-3 with master weights, moments and their gradients in host memory."""

    def _sub_group_gradients(self, sub_group: int) -> list[Tensor]:
        return [_gradient(self.master_weights()[sub_group])]


class _Bf16Zero1State(ZeroState):
    """ZeRO-1 with bf16 weights and fp32 accumulation, for which DeepSpeed has a class of its own."""

    def __init__(self, optimizer: Any, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__(optimizer, parameters)
        # DeepSpeed's norm runs over the gradients of all data ranks and is not used
        optimizer.get_grads_for_norm = lambda for_clipping=False: ([self.master_weights()[0].new_zeros(1)], {})

    def gradients(self) -> list[list[Tensor]]:
        return [[gradient] for gradient in self._optimizer.fp32_groups_gradient_flat_partition]

    def master_weights(self) -> list[Tensor]:
        return self._optimizer.fp32_groups_flat_partition

    def discard_gradients(self) -> None:
        self._optimizer.clear_hp_grads()
        self._optimizer.clear_lp_grads()


def _gradient(master: Tensor) -> Tensor:
    """Return the buffer of an offloaded master weight's gradient, which DeepSpeed keeps for the whole run."""
    assert master.grad is not None
    return master.grad


def _buckets(parameters: Sequence[Any]) -> list[list[Any]]:
    """Split parameters, in order, into buckets of about GATHER_ELEMENTS elements."""
    buckets: list[list[Any]] = [[]]
    num_elements = 0
    for parameter in parameters:
        if num_elements >= GATHER_ELEMENTS:
            buckets.append([])
            num_elements = 0
        buckets[-1].append(parameter)
        num_elements += parameter.ds_numel
    return buckets


ZERO_STATES: dict[tuple[str, bool], type[ZeroState]] = {
    ("DeepSpeedZeroOptimizer", False): ZeroState,
    ("DeepSpeedZeroOptimizer", True): _OffloadedZeroState,
    ("DeepSpeedZeroOptimizer_Stage3", False): _Zero3State,
    ("DeepSpeedZeroOptimizer_Stage3", True): _OffloadedZero3State,
    ("BF16_Optimizer", False): _Bf16Zero1State,
}
"""Class of DeepSpeed's optimizer, and whether its state is offloaded -> how to access the state."""


def build_zero_state(optimizer: Any, parameters: Sequence[nn.Parameter]) -> ZeroState:
    """Return the access to the state of ``optimizer``, over the stage's ``parameters``.

    Raises ConfigError for a DeepSpeed optimizer that is not tested.
    """
    offloaded = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    name = type(optimizer).__name__
    if (name, offloaded) not in ZERO_STATES:
        raise ConfigError(
            f"The DeepSpeed settings lead to its optimizer {name}; tested are "
            f"{', '.join(sorted({name for name, _ in ZERO_STATES}))}. Remove the setting that asks for it from the "
            "file given to --ds_config."
        )
    return ZERO_STATES[name, offloaded](optimizer, parameters)
