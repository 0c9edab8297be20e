"""Broadcast of micro-batch shapes to all ranks of a replica, and of the batches to the first pipeline stage.

One rank of each replica reads data. Later pipeline stages get everything but the shapes from the stage before them
(p2p_communication.py). B sequences, T positions, N items of a modality.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.parallel.topology import Topology
from aki_megatron.types import MEDIA_MODALITIES, Batch, Modality, StackedIds, stack_ids


@dataclass(frozen=True)
class MicrobatchShape:
    """Shapes of one micro-batch, [B, T] and those of its media, and counts for loss and report."""

    media: tuple[int, ...]
    """For each of MEDIA_MODALITIES the _MEDIA_DIMS sizes [N, ...] of its tensor, 0 after the last."""
    num_sequences: int
    sequence_length: int
    supervised_tokens: int
    tokens: int
    """Positions that are not padding."""
    num_bad_samples: int
    """Elements of the data sources that could not be used."""
    num_cut_samples: int
    """Samples whose text was cut at data.max_text_tokens."""

    def media_shape(self, modality: Modality) -> tuple[int, ...]:
        """Return [N, ...] of a modality; empty where the micro-batch has no tensor of it."""
        first = MEDIA_MODALITIES.index(modality) * _MEDIA_DIMS
        sizes = self.media[first : first + _MEDIA_DIMS]
        return sizes[: 1 + max((dim for dim, size in enumerate(sizes) if size), default=-1)]

    @property
    def num_media(self) -> int:
        """Items of all modalities."""
        return sum(self.media[::_MEDIA_DIMS])


_MEDIA_DIMS = 4


@dataclass(frozen=True)
class FirstStageInput:
    """What enters the first pipeline stage: token ids [B, T] int64, ids, media by modality, on the stage's device."""

    token_ids: Tensor
    ids: StackedIds
    media: Mapping[Modality, Tensor]


def broadcast_shapes(microbatches: Sequence[Batch], num_microbatches: int, topology: Topology) -> list[MicrobatchShape]:
    """Return the shapes of this replica's micro-batches on all its ranks, by one broadcast.

    They replace a handshake before every message between stages. Only the rank that reads data passes micro-batches.
    """
    media_columns = _MEDIA_DIMS * len(MEDIA_MODALITIES)
    num_columns = media_columns + len(MicrobatchShape.__dataclass_fields__) - 1
    shapes = torch.zeros(num_microbatches, num_columns, dtype=torch.int64)
    if topology.reads_data:
        assert len(microbatches) == num_microbatches, (len(microbatches), num_microbatches)
        rows = [astuple(_shape(batch)) for batch in microbatches]
        shapes = torch.tensor([[*media, *counts] for media, *counts in rows], dtype=torch.int64)
    if topology.tensor * topology.pipeline > 1:
        shapes = shapes.to(topology.device)
        dist.broadcast(shapes, topology.replica_source_rank, group=topology.replica_group)
    return [MicrobatchShape(tuple(row[:media_columns]), *row[media_columns:]) for row in shapes.tolist()]


def _shape(batch: Batch) -> MicrobatchShape:
    num_sequences, sequence_length = batch.token_ids.shape
    tokens = int((batch.modality_ids != Modality.PAD).sum())
    media: list[int] = []
    for modality in MEDIA_MODALITIES:
        sizes = list(batch.media[modality].shape) if batch.num_items(modality) else []
        media += sizes + [0] * (_MEDIA_DIMS - len(sizes))
    return MicrobatchShape(
        tuple(media),
        num_sequences,
        sequence_length,
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
            return FirstStageInput(batch.token_ids, stack_ids(batch), batch.media)
        packed = torch.cat([batch.token_ids.to(torch.int32).unsqueeze(-1), stack_ids(batch).stacked], dim=-1)
    else:
        columns = 1 + StackedIds.NUM_COLUMNS
        packed = torch.empty(shape.num_sequences, shape.sequence_length, columns, dtype=torch.int32, device=device)
    dist.broadcast(packed, topology.replica_source_rank, group=topology.tensor_group)
    media: dict[Modality, Tensor] = {}
    for modality in MEDIA_MODALITIES:
        if not (sizes := shape.media_shape(modality)):
            continue
        media[modality] = torch.empty(sizes, device=device) if batch is None else batch.media[modality].contiguous()
        dist.broadcast(media[modality], topology.replica_source_rank, group=topology.tensor_group)
    return FirstStageInput(packed[..., 0].long(), StackedIds(packed[..., 1:].contiguous()), media)
