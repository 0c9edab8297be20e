"""Where this process stands among the others: sizes, ranks and process groups. The only owner of groups.

Rank order: tensor fastest, then data, then pipeline: rank = tensor_rank + tensor * (data_rank + data * pipeline_rank).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from aki_megatron.errors import ConfigError
from aki_megatron.parallel.launch import Launch, discover_launch

__all__ = ["Launch", "Topology", "discover_launch", "start"]

TIMEOUT_SECONDS = 600.0
"""Longest wait in a collective: past it the process ends with an error instead of hanging behind a rank that died."""


@dataclass(frozen=True)
class Topology:
    """Sizes and ranks of the three ways of splitting, every process group, and the device of this process.

    A replica is a whole copy of the model: all tensor and pipeline ranks that share one data rank.
    """

    rank: int
    world_size: int
    local_rank: int
    tensor: int
    pipeline: int
    data: int
    device: torch.device
    groups: dict[str, ProcessGroup]
    """The groups this rank is in, by the names of GROUPS."""

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
        """Which runs of layers."""
        return self.rank // (self.tensor * self.data)

    @property
    def data_group(self) -> ProcessGroup:
        """Ranks that hold the same weights and see different samples."""
        return self.groups["data"]

    @property
    def tensor_group(self) -> ProcessGroup:
        """Ranks that hold slices of the same layers and see the same samples."""
        return self.groups["tensor"]

    @property
    def pipeline_group(self) -> ProcessGroup:
        """Ranks that hold other layers and see the same samples."""
        return self.groups["pipeline"]

    @property
    def replica_group(self) -> ProcessGroup:
        """All ranks that see the same samples."""
        return self.groups["replica"]

    @property
    def stage_group(self) -> ProcessGroup:
        """All ranks that hold the same layers, whole or in slices."""
        return self.groups["stage"]

    @property
    def embedding_group(self) -> ProcessGroup:
        """The first and the last pipeline rank with this tensor and data rank; this rank must be one of them."""
        return self.groups["edge"]

    @property
    def self_group(self) -> ProcessGroup:
        """This rank alone, for libraries that insist on a group."""
        return self.groups["alone"]

    @property
    def is_first_stage(self) -> bool:
        """Whether batches enter the model here."""
        return self.pipeline_rank == 0

    @property
    def reads_data(self) -> bool:
        """Whether this rank loads batches: one tensor rank of the first stage; the others are sent what they need."""
        return self.is_first_stage and self.tensor_rank == 0

    def peer(self, pipeline_rank: int) -> int:
        """Global rank of another pipeline rank with this tensor and data rank."""
        return self.tensor_rank + self.tensor * (self.data_rank + self.data * pipeline_rank)

    @property
    def replica_source(self) -> int:
        """Global rank of the rank of this replica that reads data."""
        return self.tensor * self.data_rank

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

    def new_gloo_group(self, timeout_seconds: float) -> ProcessGroup:
        """A group of all ranks on the CPU for a thread whose collectives must not mix with training's; collective."""
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def shutdown(self) -> None:
        """Leave the world. Without it gloo ranks sometimes abort at exit."""
        if dist.is_initialized():
            dist.destroy_process_group()


GROUPS: dict[str, Callable[[Topology, int, int, int], bool]] = {
    "tensor": lambda own, t, d, p: (d, p) == (own.data_rank, own.pipeline_rank),
    "data": lambda own, t, d, p: (t, p) == (own.tensor_rank, own.pipeline_rank),
    "pipeline": lambda own, t, d, p: (t, d) == (own.tensor_rank, own.data_rank),
    "replica": lambda own, t, d, p: d == own.data_rank,
    "stage": lambda own, t, d, p: p == own.pipeline_rank,
    "edge": lambda own, t, d, p: (t, d) == (own.tensor_rank, own.data_rank) and p in (0, own.pipeline - 1),
    "alone": lambda own, t, d, p: (t, d, p) == (own.tensor_rank, own.data_rank, own.pipeline_rank),
}
"""Group -> whether the rank at (tensor rank, data rank, pipeline rank) shares it with a rank."""


def members(own: Topology, group: str) -> list[int]:
    """Global ranks of a group of ``own``, in order; ``edge`` is without a ``own`` that is neither end."""
    ranks = []
    for rank in range(own.world_size):
        other = replace(own, rank=rank)
        if GROUPS[group](own, other.tensor_rank, other.data_rank, other.pipeline_rank):
            ranks.append(rank)
    return ranks


def _join_groups(own: Topology, timeout: timedelta) -> dict[str, ProcessGroup]:
    """Each rank makes only the groups it is in, all ranks in the same order; equal groups are made once."""
    made: dict[tuple[int, ...], ProcessGroup] = {}
    found: dict[str, ProcessGroup] = {}
    world = dist.group.WORLD
    assert world is not None
    made[tuple(range(own.world_size))] = world
    for name in GROUPS:
        ranks = members(own, name)
        if own.rank not in ranks:
            continue
        key = tuple(ranks)
        if key not in made:
            made[key] = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
        found[name] = made[key]
    return found


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
    sizes = {"tensor": tensor, "pipeline": pipeline, "data": data}
    own = Topology(launch.rank, launch.world_size, launch.local_rank, **sizes, device=device, groups={})
    return replace(own, groups=_join_groups(own, timeout))


def data_size(world_size: int, *, tensor: int, pipeline: int) -> int:
    """Number of data ranks.

    Errors: ConfigError when tensor x pipeline does not divide the world.
    """
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
