"""Sizes, ranks and process groups of tensor, data and pipeline parallelism. The only place that creates groups.

Rank order: tensor fastest, then data, then pipeline: rank = tensor_rank + tensor * (data_rank + data * pipeline_rank).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from aki_megatron.config.batch_sizes import num_replicas
from aki_megatron.errors import ConfigError
from aki_megatron.parallel.launch import Launch, discover_launch, without_launch

__all__ = ["Launch", "Topology", "discover_launch", "init_distributed"]

TIMEOUT_SECONDS = 600.0
"""Timeout of collectives: past it the process ends with an error instead of waiting for a rank that died."""


@dataclass(frozen=True)
class Topology:
    """Parallel sizes and ranks, every process group, and the device of this process.

    tensor, pipeline, data  number of tensor, pipeline and data ranks
    groups                  the groups this rank is in, by the names of GROUPS

    A replica is one copy of the model: all tensor and pipeline ranks with the same data rank.
    """

    rank: int
    world_size: int
    local_rank: int
    tensor: int
    pipeline: int
    data: int
    device: torch.device
    groups: dict[str, ProcessGroup]

    @property
    def tensor_rank(self) -> int:
        """Which shard of each layer this rank holds."""
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this rank trains on."""
        return self.rank // self.tensor % self.data

    @property
    def pipeline_rank(self) -> int:
        """Which pipeline stages this rank holds."""
        return self.rank // (self.tensor * self.data)

    @property
    def data_group(self) -> ProcessGroup:
        """Ranks that hold the same parameters and train on different samples."""
        return self.groups["data"]

    @property
    def tensor_group(self) -> ProcessGroup:
        """Ranks that hold shards of the same layers and train on the same samples."""
        return self.groups["tensor"]

    @property
    def pipeline_group(self) -> ProcessGroup:
        """Ranks that hold other layers and train on the same samples."""
        return self.groups["pipeline"]

    @property
    def replica_group(self) -> ProcessGroup:
        """All ranks of this replica: they train on the same samples."""
        return self.groups["replica"]

    @property
    def pipeline_stage_group(self) -> ProcessGroup:
        """All ranks that hold the same layers or shards of them: tensor x data."""
        return self.groups["pipeline_stage"]

    @property
    def embedding_group(self) -> ProcessGroup:
        """The first and the last pipeline rank with this tensor and data rank; this rank must be one of them."""
        return self.groups["embedding"]

    @property
    def self_group(self) -> ProcessGroup:
        """This rank alone, for libraries that require a group."""
        return self.groups["self"]

    @property
    def is_first_pipeline_rank(self) -> bool:
        """Whether batches enter the model on this rank."""
        return self.pipeline_rank == 0

    @property
    def reads_data(self) -> bool:
        """Whether this rank loads batches: tensor rank 0 of the first pipeline rank, which sends them to the others."""
        return self.is_first_pipeline_rank and self.tensor_rank == 0

    def peer(self, pipeline_rank: int) -> int:
        """Return the global rank of another pipeline rank with this tensor and data rank."""
        return self.tensor_rank + self.tensor * (self.data_rank + self.data * pipeline_rank)

    @property
    def replica_source_rank(self) -> int:
        """Global rank of the one rank of this replica that reads data."""
        return self.tensor * self.data_rank

    def sum_over_data(self, numbers: Sequence[float]) -> list[float]:
        """Sum each number over the data ranks, in float64, by one all-reduce."""
        if self.data == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.data_group)
        return total.tolist()

    def sum_over_world(self, numbers: Sequence[float]) -> list[float]:
        """Sum each number over all ranks, in float64, by one all-reduce."""
        if self.world_size == 1:
            return [float(number) for number in numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self) -> None:
        """Wait for every rank of the world."""
        if self.device.type == "cuda":
            dist.barrier(device_ids=[self.device.index])
        else:
            dist.barrier()

    def new_gloo_group(self, timeout_seconds: float) -> ProcessGroup:
        """Create a gloo group of all ranks, for a thread whose collectives must not mix with training's; collective."""
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def shutdown(self) -> None:
        """Destroy the process groups. Without it gloo ranks sometimes abort at exit."""
        if dist.is_initialized():
            dist.destroy_process_group()


GROUPS: dict[str, Callable[[Topology, int, int, int], bool]] = {
    "tensor": lambda own, t, d, p: (d, p) == (own.data_rank, own.pipeline_rank),
    "data": lambda own, t, d, p: (t, p) == (own.tensor_rank, own.pipeline_rank),
    "pipeline": lambda own, t, d, p: (t, d) == (own.tensor_rank, own.data_rank),
    "replica": lambda own, t, d, p: d == own.data_rank,
    "pipeline_stage": lambda own, t, d, p: p == own.pipeline_rank,
    "embedding": lambda own, t, d, p: (t, d) == (own.tensor_rank, own.data_rank) and p in (0, own.pipeline - 1),
    "self": lambda own, t, d, p: (t, d, p) == (own.tensor_rank, own.data_rank, own.pipeline_rank),
}
"""Group -> whether the rank at (tensor rank, data rank, pipeline rank) is in the group of rank ``own``."""


def group_ranks(own: Topology, group: str) -> list[int]:
    """Return the global ranks of a group of ``own``, in order.

    ``embedding`` does not contain ``own`` when that is neither the first nor the last pipeline rank.
    """
    ranks = []
    for rank in range(own.world_size):
        other = replace(own, rank=rank)
        if GROUPS[group](own, other.tensor_rank, other.data_rank, other.pipeline_rank):
            ranks.append(rank)
    return ranks


def _create_groups(own: Topology, timeout: timedelta) -> dict[str, ProcessGroup]:
    """Create the groups this rank is in, on all ranks in the same order; groups of the same ranks are created once."""
    world = dist.group.WORLD
    assert world is not None
    created: dict[tuple[int, ...], ProcessGroup] = {tuple(range(own.world_size)): world}
    groups: dict[str, ProcessGroup] = {}
    for name in GROUPS:
        ranks = tuple(group_ranks(own, name))
        if own.rank not in ranks:
            continue
        if ranks not in created:
            created[ranks] = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
        groups[name] = created[ranks]
    return groups


def init_distributed(
    launch: Launch, *, tensor: int, pipeline: int, timeout_seconds: float = TIMEOUT_SECONDS
) -> Topology:
    """Initialize torch.distributed and create the groups: NCCL with one GPU per process, or gloo without CUDA.

    Raises ConfigError when the sizes do not divide the number of processes, or a machine has more processes than GPUs.
    """
    data = num_replicas(launch.world_size, tensor=tensor, pipeline=pipeline)
    device = local_device(launch)
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed requires the first variable; without the second it starts a program in every step to count CPU nodes
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
    return replace(own, groups=_create_groups(own, timeout))


def environment_outside_launch() -> dict[str, str]:
    """Return the environment of a process that is none of this launch's, such as a job that this one submits."""
    return without_launch(os.environ)


def local_device(launch: Launch) -> torch.device:
    """Return the GPU of this process, which becomes torch's current one; the CPU where there is no GPU.

    Raises ConfigError where the machine has fewer GPUs than processes.
    """
    if not torch.cuda.is_available():
        # DeepSpeed chooses its accelerator once, at first use; with this variable it neither probes nor warns
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
