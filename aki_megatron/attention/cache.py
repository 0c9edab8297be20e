"""Generation: the keys and values of one layer, and one new token per row over them.

The prompt is prefilled through ``attend`` with its own layout; every later token sees all that is valid in the cache.
That equals recomputation, because what is generated is scored, so no earlier row may look at it.
Letters: B rows, Hq query heads, Hkv key heads, C capacity, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCache:
    """Keys and values [B, Hkv, C, d] of one layer; row b holds ``lengths[b]`` valid tokens, from place 0 on."""

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.keys = torch.zeros(batch, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.longest = 0
        """Upper bound of ``lengths`` known on the host, so that decoding never waits for the device."""
        self.even = True
        """Whether all rows are known to have ``longest`` tokens: then no mask is needed."""

    def fill(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Take over a prefilled prompt.

        keys, values  [B, Hkv, T, d], right padded
        lengths       [B] valid tokens of each row
        """
        width = keys.shape[2]
        self._room(width)
        self.keys[:, :, :width] = keys
        self.values[:, :, :width] = values
        self.lengths.copy_(lengths)
        counts = lengths.tolist()
        if not all(0 < count <= width for count in counts):
            raise ValueError(f"prompt lengths {counts} must lie in 1..{width}, the width of the keys given")
        self.longest, self.even = max(counts), min(counts) == max(counts)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add one token to every row: keys and values [B, Hkv, 1, d], written after the row's last valid token."""
        self._room(self.longest + 1)
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        self.keys[rows, :, self.lengths] = keys.squeeze(2)
        self.values[rows, :, self.lengths] = values.squeeze(2)
        self.lengths += 1
        self.longest += 1

    def _room(self, tokens: int) -> None:
        if tokens > self.keys.shape[2]:
            raise ValueError(f"{tokens} tokens do not fit a cache of capacity {self.keys.shape[2]}; make it larger")


def attend_cached(q: Tensor, cache: LayerCache) -> Tensor:
    """Attention of one new token per row, after its own key was appended: q [B, Hq, 1, d] -> [B, Hq, 1, d]."""
    batch, heads, tokens, width = q.shape
    if tokens != 1:
        raise ValueError(f"attend_cached takes one token per row, got {tokens}")
    keys, values = cache.keys[:, :, : cache.longest], cache.values[:, :, : cache.longest]
    # the query heads that share a key head become its query rows: grouped-query attention without expanding keys
    grouped = q.reshape(batch, keys.shape[1], heads // keys.shape[1], width)
    mask = None
    if not cache.even:
        mask = (torch.arange(cache.longest, device=q.device) < cache.lengths[:, None])[:, None, None, :]
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(batch, heads, 1, width)
