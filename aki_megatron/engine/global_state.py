"""Logical tensors: what a checkpoint holds, by names and shapes that no layout changes.

Each tensor is whole in meaning and sharded by rows over the data ranks in memory (a DTensor), so that any other layout
can read it.
"""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

WEIGHT, MOMENTS, STEP = "weight", ("exp_avg", "exp_avg_sq"), "optimizer.step"
"""``weight.<parameter>``: float32 master weight; moments: AdamW's; ``optimizer.step``: number of its updates."""


def key(kind: str, parameter: str) -> str:
    """Name of a logical tensor: ``exp_avg.decoder.norm.weight``."""
    return f"{kind}.{parameter}"


def shard_rows(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's rows of ``whole``, copied so that the rest can be freed, as a DTensor of the whole's shape.

    Rows go to ranks as torch.chunk cuts them; a rank may get none. A scalar is replicated. On one rank it is the whole.
    """
    if whole.dim() == 0:
        return DTensor.from_local(whole.clone(), mesh, [Replicate()], run_check=False)
    ranks, rank = mesh.size(), mesh.get_local_rank()
    rows = -(-whole.shape[0] // ranks)
    first = min(rank * rows, whole.shape[0])
    local = whole[first : first + rows].clone()
    return DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


def gather(tensor: Tensor) -> Tensor:
    """The whole of a logical tensor; collective when it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def flat_share(whole: Tensor, numel: int, rank: int) -> Tensor:
    """Elements rank*numel ... (rank+1)*numel of the flattened tensor, zero past its end: a ZeRO-3 partition."""
    flat = whole.reshape(-1)
    share = torch.zeros(numel, dtype=whole.dtype, device=whole.device)
    piece = flat[rank * numel : (rank + 1) * numel]
    share[: piece.numel()] = piece
    return share
