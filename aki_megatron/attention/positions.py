"""Concentric position ids: what rule ``cca`` takes in place of 0, 1, 2, ... (cca-llava).

Letters: B sequences, T positions.
"""

import numpy as np
from numpy.typing import NDArray

from aki_megatron.attention.rules import rings, square_side
from aki_megatron.attention.token_segments import TokenSegments, group_and_rank


def concentric_positions(tokens: TokenSegments, image_tokens: int) -> NDArray[np.int32]:
    """Position ids [B, T], restarting at 0 in every segment, 0 on padding.

    An image of g * g latents, row-major, takes ceil(g / 2) position ids instead of g * g: a latent on ring r gets the
    image's first id plus r, and the first token after the image follows the innermost ring.

    Raises MaskError when the latents of an image are not a square number.
    """
    images = tokens.images(image_tokens)
    advance, ring = np.ones(len(tokens.positions), dtype=np.int64), np.zeros(len(tokens.positions), dtype=np.int64)
    for size in np.unique(images.sizes):
        of_size = images.starts[images.sizes == size][:, None] + np.arange(size)
        ring_of_cell = rings(square_side(int(size)))
        ring[of_size] = ring_of_cell
        advance[of_size] = 0
        advance[of_size[:, -1]] = ring_of_cell.max() + 1
    before = np.cumsum(advance) - advance
    segment, _ = group_and_rank(tokens.segments.sizes)
    positions = np.zeros(tokens.batch_size * tokens.length, dtype=np.int32)
    positions[tokens.positions] = before - before[tokens.segments.starts][segment] + ring
    return positions.reshape(tokens.batch_size, tokens.length)
