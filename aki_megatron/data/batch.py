"""Samples to a rectangle: right padding, ids as tensors, images as one stack."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import DTypeLike

from aki_megatron.data.image import decode_image, normalize
from aki_megatron.flow import IGNORE, NO_SEGMENT, Batch, Modality, Picture, Sample


def collate(samples: Sequence[Sample], *, pad_id: int, image_size: int) -> Batch:
    """One sample per row, padded on the right to the longest. Images that are still encoded are decoded here.

    Raises UnreadableImage; samples of a stream bring decoded images and cannot raise.
    """
    assert samples
    rows, width = len(samples), max(len(sample.token_ids) for sample in samples)
    token_ids = _filled(rows, width, pad_id, np.int64)
    modality_ids = _filled(rows, width, Modality.PAD, np.int8)
    segment_ids = _filled(rows, width, NO_SEGMENT, np.int32)
    position_ids = _filled(rows, width, 0, np.int32)
    targets = _filled(rows, width, IGNORE, np.int64)
    places = np.arange(width, dtype=np.int32)
    for row, sample in enumerate(samples):
        length = len(sample.token_ids)
        token_ids[row, :length] = sample.token_ids
        modality_ids[row, :length] = sample.modality_ids
        segment_ids[row, :length] = 0
        position_ids[row, :length] = places[:length]
        targets[row, :length] = sample.targets
    pictures = [_decoded(sample.image, image_size, sample.key) for sample in samples if sample.image is not None]
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        modality_ids=torch.from_numpy(modality_ids),
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(position_ids),
        targets=torch.from_numpy(targets),
        pixels=normalize(pictures, image_size),
    )


def _filled(rows: int, width: int, value: int, dtype: DTypeLike) -> np.ndarray:
    return np.full((rows, width), int(value), dtype=dtype)


def _decoded(image: Path | bytes | Picture, size: int, key: str) -> Picture:
    return image if isinstance(image, Picture) else decode_image(image, size, key=key)
