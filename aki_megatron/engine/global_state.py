"""Global state: what a checkpoint holds, as tensors whose names and shapes do not depend on the parallel layout.

In memory each tensor is a DTensor sharded along its first dimension over the ranks that hold it, so that any other
layout can load it.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

WEIGHT, MOMENTS, STEP = "weight", ("exp_avg", "exp_avg_sq"), "optimizer.step"
"""``weight.<parameter>``: float32 master weight; moments: AdamW's; ``optimizer.step``: number of its updates, and
``optimizer.step.<n>`` of those since phase n began, for parts that began to train in it."""


def step_key(since: int) -> str:
    """Return the name of the number of updates since a phase of the run (PartPlan.since)."""
    return f"{STEP}.{since}" if since else STEP


def key(kind: str, parameter: str) -> str:
    """Return the name of a global tensor, for example ``exp_avg.lm_head.norm.weight``."""
    return f"{kind}.{parameter}"


def shard_first_dim(full: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return ``full`` as a DTensor of the same shape that holds this rank's rows, copied so that the rest can be freed.

    Rows are distributed as torch.chunk does; a rank may get none. A scalar is replicated.
    """
    if full.dim() == 0:
        return DTensor.from_local(full.clone(), mesh, [Replicate()], run_check=False)
    num_ranks, rank = mesh.size(), mesh.get_local_rank()
    rows = -(-full.shape[0] // num_ranks)
    first = min(rank * rows, full.shape[0])
    local = full[first : first + rows].clone()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def gather(tensor: Tensor) -> Tensor:
    """Return the full tensor; collective when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def zero_partition(full: Tensor, numel: int, rank: int) -> Tensor:
    """Return ZeRO-3's partition of ``rank``: elements rank * numel ... (rank + 1) * numel of the flattened tensor.

    Past the end of the tensor it is zero.
    """
    flat = full.reshape(-1)
    partition = torch.zeros(numel, dtype=full.dtype, device=full.device)
    elements = flat[rank * numel : (rank + 1) * numel]
    partition[: elements.numel()] = elements
    return partition
