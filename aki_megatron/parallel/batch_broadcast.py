"""Broadcast of micro-batch shapes to all ranks of a replica, and of the batches to the first pipeline stage.

One rank of each replica reads data. Later pipeline stages get everything but the shapes from the stage before them
(p2p_communication.py). B sequences, T positions, N images.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.parallel.topology import Topology
from aki_megatron.types import Batch, Modality, StackedIds, stack_ids


@dataclass(frozen=True)
class MicrobatchShape:
    """Shapes of one micro-batch, [B, T] and [N, 3, height, width], and counts for loss and report."""

    num_sequences: int
    sequence_length: int
    num_images: int
    height: int
    width: int
    supervised_tokens: int
    tokens: int
    """Positions that are not padding."""
    num_bad_samples: int
    """Elements of the data sources that could not be used."""
    num_cut_samples: int
    """Samples whose text was cut at data.max_text_tokens."""


@dataclass(frozen=True)
class FirstStageInput:
    """What enters the first pipeline stage: token ids [B, T] int64, ids, pixels [N, 3, H, W], on the stage's device."""

    token_ids: Tensor
    ids: StackedIds
    pixels: Tensor


def broadcast_shapes(microbatches: Sequence[Batch], num_microbatches: int, topology: Topology) -> list[MicrobatchShape]:
    """Return the shapes of this replica's micro-batches on all its ranks, by one broadcast.

    They replace a handshake before every message between stages. Only the rank that reads data passes micro-batches.
    """
    shapes = torch.zeros(num_microbatches, len(MicrobatchShape.__dataclass_fields__), dtype=torch.int64)
    if topology.reads_data:
        assert len(microbatches) == num_microbatches, (len(microbatches), num_microbatches)
        shapes = torch.tensor([astuple(_shape(batch)) for batch in microbatches], dtype=torch.int64)
    if topology.tensor * topology.pipeline > 1:
        shapes = shapes.to(topology.device)
        dist.broadcast(shapes, topology.replica_source_rank, group=topology.replica_group)
    return [MicrobatchShape(*numbers) for numbers in shapes.tolist()]


def _shape(batch: Batch) -> MicrobatchShape:
    num_sequences, sequence_length = batch.token_ids.shape
    num_images, _, height, width = batch.pixels.shape
    tokens = int((batch.modality_ids != Modality.PAD).sum())
    return MicrobatchShape(
        num_sequences,
        sequence_length,
        num_images,
        height,
        width,
        batch.supervised_tokens,
        tokens,
        batch.num_bad_samples,
        batch.num_cut_samples,
    )


def broadcast_batch(batch: Batch | None, shape: MicrobatchShape, topology: Topology) -> FirstStageInput:
    """Return a micro-batch on all tensor ranks of the first pipeline rank; only the rank that reads data passes it."""
    device = topology.device
    if topology.reads_data:
        assert batch is not None
        batch = batch.to(device)
        if topology.tensor == 1:
            return FirstStageInput(batch.token_ids, stack_ids(batch), batch.pixels)
        packed = torch.cat([batch.token_ids.to(torch.int32).unsqueeze(-1), stack_ids(batch).stacked], dim=-1)
        pixels = batch.pixels.contiguous()
    else:
        columns = 1 + StackedIds.NUM_COLUMNS
        packed = torch.empty(shape.num_sequences, shape.sequence_length, columns, dtype=torch.int32, device=device)
        pixels = torch.empty(shape.num_images, 3, shape.height, shape.width, device=device)
    dist.broadcast(packed, topology.replica_source_rank, group=topology.tensor_group)
    if shape.num_images:
        dist.broadcast(pixels, topology.replica_source_rank, group=topology.tensor_group)
    return FirstStageInput(packed[..., 0].long(), StackedIds(packed[..., 1:].contiguous()), pixels)
