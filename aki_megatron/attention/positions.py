"""Concentric position ids: what rule ``cca`` puts in place of 0, 1, 2, ... (cca-llava).

Letters: B rows, T tokens.
"""

import numpy as np
import torch
from torch import Tensor

from aki_megatron.attention.rules import rings, square_side
from aki_megatron.attention.token_segments import segment_tokens, spread


def concentric_positions(modality_ids: Tensor, segment_ids: Tensor, *, image_tokens: int = 0) -> Tensor:
    """Position ids int32 [B, T], restarting at 0 in every segment, 0 on padding.

    An image of g * g latents, row-major, takes g / 2 positions instead of g * g: a latent on ring r gets the image's
    first position plus r, and the first token after the image follows the innermost ring.
    """
    reading = segment_tokens(
        np.ascontiguousarray(modality_ids.cpu().numpy(), dtype=np.int8),
        np.ascontiguousarray(segment_ids.cpu().numpy(), dtype=np.int32),
    )
    images = reading.images(image_tokens)
    advance, ring = np.ones(len(reading.place), dtype=np.int64), np.zeros(len(reading.place), dtype=np.int64)
    for size in np.unique(images.ends - images.starts):
        of_size = images.starts[images.ends - images.starts == size][:, None] + np.arange(size)
        of_cell = rings(square_side(int(size)))
        ring[of_size] = of_cell
        advance[of_size] = 0
        advance[of_size[:, -1]] = of_cell.max() + 1
    before = np.cumsum(advance) - advance
    segment, _ = spread(reading.segments.ends - reading.segments.starts)
    positions = np.zeros(reading.rows * reading.width, dtype=np.int32)
    positions[reading.place] = before - before[reading.segments.starts][segment] + ring
    return torch.from_numpy(positions.reshape(reading.rows, reading.width))
