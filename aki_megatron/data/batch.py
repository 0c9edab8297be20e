"""Samples to a rectangle: rows of one or several samples, right padding, ids as tensors, images as one stack."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike

from aki_megatron.data.image import decode_image, normalize
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, Picture, Sample


def collate(
    rows: Sequence[Sequence[Sample]], *, pad_id: int, image_size: int, sequence_length: int | None = None, bad: int = 0
) -> Batch:
    """Rows of samples, one segment per sample, in the order given; the rest of a row is padding on the right.

    sequence_length  places of every row; None: as many as the longest row has
    bad         elements that could not be used, for the batch to carry

    Positions restart in every segment and targets are the samples' own, so nothing is predicted across segments. A
    sample that could not be had is left out of its row by the caller; a row may even be empty. Images that are still
    encoded are decoded here.

    Raises ValueError for a row with more than ``sequence_length`` places, and UnreadableImage; samples of a stream bring
    decoded images and cannot raise that.
    """
    assert rows
    widest = max(sum(len(sample.token_ids) for sample in row) for row in rows)
    width = max(widest, 1) if sequence_length is None else sequence_length
    if widest > width:
        raise ValueError(f"A row holds {widest} tokens, more than sequence_length={width}; pack with the same limit.")
    token_ids = _filled(len(rows), width, pad_id, np.int64)
    modality_ids = _filled(len(rows), width, Modality.PAD, np.int8)
    segment_ids = _filled(len(rows), width, NO_SEGMENT, np.int32)
    position_ids = _filled(len(rows), width, 0, np.int32)
    targets = _filled(len(rows), width, IGNORE, np.int64)
    positions = np.arange(width, dtype=np.int32)
    for number, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row):
            length = len(sample.token_ids)
            places = (number, slice(start, start + length))
            token_ids[places] = sample.token_ids
            modality_ids[places] = sample.modality_ids
            segment_ids[places] = segment
            position_ids[places] = positions[:length]
            targets[places] = sample.targets
            start += length
    pictures = [
        _decoded(sample.image, image_size, sample.key) for row in rows for sample in row if sample.image is not None
    ]
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        modality_ids=torch.from_numpy(modality_ids),
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(position_ids),
        targets=torch.from_numpy(targets),
        pixels=normalize(pictures, image_size),
        bad=bad,
    )


def _filled(rows: int, width: int, value: int, dtype: DTypeLike) -> np.ndarray:
    return np.full((rows, width), int(value), dtype=dtype)


def _decoded(image: Path | bytes | Picture, size: int, key: str) -> Picture:
    return image if isinstance(image, Picture) else decode_image(image, size, key=key)
