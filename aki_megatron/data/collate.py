"""Collate samples into a batch: sequences of one or several samples, right padding, ids as tensors, stacked media.

B sequences, T positions, N items of a modality.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

from aki_megatron.data.image import decode_image, normalize
from aki_megatron.data.media import STACKS
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, DecodedImage, Modality, Sample


def collate(
    sequences: Sequence[Sequence[Sample]],
    *,
    pad_id: int,
    image_size: int,
    sequence_length: int | None = None,
    num_bad_samples: int = 0,
) -> Batch:
    """Build a batch from B sequences of samples: one segment per sample in the given order, then right padding.

    sequence_length  positions of every sequence (T); None: as many as the longest one has
    num_bad_samples  samples that could not be used, passed on in the batch

    Positions restart in every segment and targets are the samples' own, so nothing is predicted across segments. A
    sequence may be empty. Media come decoded, as streams return them; images that are still encoded are decoded here.
    Images are in every batch, none of them as N = 0; of other modalities those that the samples have.

    Raises ValueError for a sequence longer than ``sequence_length``, and UnreadableImage.
    """
    assert sequences
    longest = max(sum(len(sample.token_ids) for sample in sequence) for sequence in sequences)
    length = max(longest, 1) if sequence_length is None else sequence_length
    if longest > length:
        raise ValueError(
            f"A sequence holds {longest} tokens, more than sequence_length={length}; pack with the same limit."
        )
    token_ids = _filled(len(sequences), length, pad_id, np.int64)
    modality_ids = _filled(len(sequences), length, Modality.PAD, np.int8)
    segment_ids = _filled(len(sequences), length, NO_SEGMENT, np.int32)
    position_ids = _filled(len(sequences), length, 0, np.int32)
    targets = _filled(len(sequences), length, IGNORE, np.int64)
    positions = np.arange(length, dtype=np.int32)
    for index, sequence in enumerate(sequences):
        start = 0
        for segment, sample in enumerate(sequence):
            num_tokens = len(sample.token_ids)
            where = (index, slice(start, start + num_tokens))
            token_ids[where] = sample.token_ids
            modality_ids[where] = sample.modality_ids
            segment_ids[where] = segment
            position_ids[where] = positions[:num_tokens]
            targets[where] = sample.targets
            start += num_tokens
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        modality_ids=torch.from_numpy(modality_ids),
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(position_ids),
        targets=torch.from_numpy(targets),
        media=_stack_media([sample for sequence in sequences for sample in sequence], image_size),
        num_bad_samples=num_bad_samples,
        num_cut_samples=sum(sample.num_cut_tokens > 0 for sequence in sequences for sample in sequence),
    )


def _filled(num_sequences: int, length: int, value: int, dtype: DTypeLike) -> np.ndarray:
    return np.full((num_sequences, length), int(value), dtype=dtype)


def _stack_media(samples: Sequence[Sample], image_size: int) -> dict[Modality, Tensor]:
    """Return the inputs of the encoders [N, ...] by modality, in the order of the samples and of their media."""
    contents: dict[Modality, list[Any]] = {Modality.IMAGE: []}
    for sample in samples:
        for item in sample.media:
            content = item.content
            if item.modality == Modality.IMAGE and isinstance(content, Path | bytes):
                content = decode_image(content, image_size, key=sample.key)
            contents.setdefault(item.modality, []).append(content)
    images: list[DecodedImage] = contents.pop(Modality.IMAGE)
    stacked = {modality: STACKS[modality](items) for modality, items in contents.items()}
    return {Modality.IMAGE: normalize(images, image_size)} | stacked
