"""One rank of a replica reads; the others are told the sizes of the step, and the first stage its batches.

B rows, T tokens, N images. Later stages get everything else from the stage before them (wire.py).
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Batch, Modality, stack_ids


@dataclass(frozen=True)
class MicrobatchShape:
    """Sizes of one micro-batch: shapes [rows, tokens] and [images, 3, height, width], and how many tokens count."""

    rows: int
    tokens: int
    images: int
    height: int
    width: int
    supervised: int
    real: int
    """Tokens that are not padding."""
    bad: int
    """Elements that could not be used."""


@dataclass(frozen=True)
class StageInput:
    """What enters the first stage, on its device: token ids [B, T] int64, ids [B, T, 4] int32, pixels [N, 3, H, W]."""

    token_ids: Tensor
    ids: Tensor
    pixels: Tensor


def broadcast_shapes(microbatches: Sequence[Batch], count: int, topology: Topology) -> list[MicrobatchShape]:
    """Sizes of this replica's ``count`` micro-batches, on all its ranks, by one broadcast.

    It replaces a handshake before every message between stages. Only the rank that reads data gives micro-batches.
    """
    sizes = torch.zeros(count, len(MicrobatchShape.__dataclass_fields__), dtype=torch.int64)
    if topology.reads_data:
        assert len(microbatches) == count, f"{len(microbatches)} micro-batches, the engine was built for {count}"
        sizes = torch.tensor([astuple(_size(batch)) for batch in microbatches], dtype=torch.int64)
    if topology.tensor * topology.pipeline > 1:
        sizes = sizes.to(topology.device)
        dist.broadcast(sizes, topology.replica_source, group=topology.replica_group)
    return [MicrobatchShape(*row) for row in sizes.tolist()]


def _size(batch: Batch) -> MicrobatchShape:
    rows, tokens = batch.token_ids.shape
    images, _, height, width = batch.pixels.shape
    real = int((batch.modality_ids != Modality.PAD).sum())
    return MicrobatchShape(rows, tokens, images, height, width, batch.supervised_tokens, real, batch.bad)


def broadcast_batch(batch: Batch | None, size: MicrobatchShape, topology: Topology) -> StageInput:
    """One micro-batch on every tensor rank of the first stage; only the rank that reads data gives it."""
    device = topology.device
    if topology.reads_data:
        assert batch is not None
        batch = batch.to(device)
        if topology.tensor == 1:
            return StageInput(batch.token_ids, stack_ids(batch), batch.pixels)
        packed = torch.cat([batch.token_ids.to(torch.int32).unsqueeze(-1), stack_ids(batch)], dim=-1)
        pixels = batch.pixels.contiguous()
    else:
        packed = torch.empty(size.rows, size.tokens, 5, dtype=torch.int32, device=device)
        pixels = torch.empty(size.images, 3, size.height, size.width, device=device)
    dist.broadcast(packed, topology.replica_source, group=topology.tensor_group)
    if size.images:
        dist.broadcast(pixels, topology.replica_source, group=topology.tensor_group)
    return StageInput(packed[..., 0].long(), packed[..., 1:].contiguous(), pixels)
