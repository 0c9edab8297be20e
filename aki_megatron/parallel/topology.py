"""Where this process stands among the others: sizes, ranks and process groups. The only owner of groups.

Rank order: tensor fastest, then data, then pipeline: rank = tensor_rank + tensor * (data_rank + data * pipeline_rank).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from aki_megatron.flow import ConfigError
from aki_megatron.parallel.launch import Launch, discover_launch

__all__ = ["Launch", "Topology", "discover_launch", "start"]

TIMEOUT_SECONDS = 600.0
"""Longest wait in a collective: past it the process ends with an error instead of hanging behind a rank that died."""


@dataclass(frozen=True)
class Topology:
    """Sizes and ranks of the three ways of splitting, the data group, and the device of this process."""

    rank: int
    world_size: int
    local_rank: int
    tensor: int
    pipeline: int
    data: int
    device: torch.device
    data_group: ProcessGroup
    """Ranks that hold the same weights and see different samples."""

    @property
    def tensor_rank(self) -> int:
        """Which slice of each layer."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Which share of the batch."""
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        """Which run of layers."""
        return self.rank // (self.tensor * self.data)

    def sum_over_data(self, numbers: Sequence[float]) -> list[float]:
        """Sums of each number over the data ranks, in float64, by one all-reduce."""
        if self.data == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.data_group)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        if self.device.type == "cuda":
            dist.barrier(device_ids=[self.device.index])
        else:
            dist.barrier()

    def shutdown(self) -> None:
        """Leave the world. Without it gloo ranks sometimes abort at exit."""
        if dist.is_initialized():
            dist.destroy_process_group()


def start(launch: Launch, *, tensor: int, pipeline: int, timeout_seconds: float = TIMEOUT_SECONDS) -> Topology:
    """Join the world of ``launch`` and build the groups: NCCL and one GPU per process with CUDA, else gloo on the CPU.

    Errors: ConfigError for sizes that do not fit the number of processes, or more processes on a machine than GPUs.
    """
    data = data_size(launch.world_size, tensor=tensor, pipeline=pipeline)
    device = _device(launch)
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed insists on the first variable; without the second it starts a program in every step to count CPU nodes
    os.environ["LOCAL_RANK"] = str(launch.local_rank)
    os.environ.setdefault("LOCAL_SIZE", str(max(launch.local_world_size, 1)))
    if launch.world_size == 1:
        store: dist.Store = dist.HashStore()
        dist.init_process_group(_backend(device), store=store, rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(
            _backend(device),
            init_method=f"tcp://{launch.master_address}:{launch.master_port}",
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    data_group = dist.group.WORLD
    assert data_group is not None
    return Topology(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        device=device,
        data_group=data_group,
    )


def data_size(world_size: int, *, tensor: int, pipeline: int) -> int:
    """Number of data ranks.

    Errors: ConfigError when tensor x pipeline does not divide the world, or asks for a split that does not exist yet.
    """
    for name, size in (("tensor", tensor), ("pipeline", pipeline)):
        if size != 1:
            raise ConfigError(
                f"parallel.{name}={size} is not supported: this version spreads a run over data-parallel ranks only "
                f"(ZeRO 1, 2 or 3). Set parallel.{name}=1."
            )
    if world_size % (tensor * pipeline):
        raise ConfigError(
            f"{world_size} processes cannot be split into parallel.tensor={tensor} x parallel.pipeline={pipeline} "
            f"x data; start a multiple of {tensor * pipeline} processes."
        )
    return world_size // (tensor * pipeline)


def _device(launch: Launch) -> torch.device:
    if not torch.cuda.is_available():
        # DeepSpeed picks its accelerator once, at first use; told so, it neither probes nor warns
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return torch.device("cpu")
    if launch.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {launch.local_rank} has no GPU: this machine shows {torch.cuda.device_count()}. Start at most "
            "that many processes per machine, or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on the CPU."
        )
    device = torch.device("cuda", launch.local_rank)
    torch.cuda.set_device(device)
    return device


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
