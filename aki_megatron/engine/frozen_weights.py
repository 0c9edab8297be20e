"""Frozen weights in float32, as they were loaded, beside the rounded copies that forward passes use."""

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.engine import global_state
from aki_megatron.parallel.topology import Topology


class FrozenWeights:
    """Float32 copies of a stage's frozen weights in host memory, partitioned over the data ranks.

    In bf16 the optimizer keeps float32 master weights of the trainable parameters only. A checkpoint must hold the
    frozen ones bit for bit too, or each run that starts from it starts from an encoder that was rounded.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._partitions: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}

    def set(self, name: str, value: Tensor) -> None:
        """Keep this rank's partition of ``value``, which is the same on every data rank."""
        num_elements = -(-value.numel() // self._topology.data)
        partition = global_state.zero_partition(value.detach().float(), num_elements, self._topology.data_rank)
        self._partitions[name], self._shapes[name] = partition.cpu(), value.shape

    def get(self, name: str) -> Tensor:
        """Return the whole weight on the training device; collective over the data ranks."""
        partition, shape = self._partitions[name].to(self._topology.device), self._shapes[name]
        full = torch.empty(partition.numel() * self._topology.data, device=partition.device)
        dist.all_gather(list(full.chunk(self._topology.data)), partition, group=self._topology.data_group)
        return full[: shape.numel()].view(shape)
