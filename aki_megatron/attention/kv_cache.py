"""Generation: the keys and values of one layer, and one new token per sequence over them.

The prompt is prefilled through ``attend`` with its own mask; every later token sees all that is valid in the cache.
That equals recomputation, because a generated position counts as supervised, so no earlier query may see it.
Letters: B sequences, Hq query heads, Hkv key heads, C capacity, d head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCache:
    """Keys and values [B, Hkv, C, d] of one layer; sequence b holds ``lengths[b]`` valid tokens, from position 0 on."""

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.keys = torch.zeros(batch_size, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.max_length = 0
        """Upper bound of ``lengths`` known on the host, so that decoding never waits for the device."""
        self.equal_lengths = True
        """Whether all sequences are known to have ``max_length`` tokens: then no mask is needed."""

    def fill(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Store a prefilled prompt.

        keys, values  [B, Hkv, T, d], right padded
        lengths       [B] valid tokens of each sequence
        """
        padded_length = keys.shape[2]
        self._check_capacity(padded_length)
        self.keys[:, :, :padded_length] = keys
        self.values[:, :, :padded_length] = values
        self.lengths.copy_(lengths)
        counts = lengths.tolist()
        if not all(0 < count <= padded_length for count in counts):
            raise ValueError(f"prompt lengths {counts} must lie in 1..{padded_length}, the length of the keys given")
        self.max_length, self.equal_lengths = max(counts), min(counts) == max(counts)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add one token to every sequence: keys and values [B, Hkv, 1, d], written after its last valid token."""
        self._check_capacity(self.max_length + 1)
        sequences = torch.arange(len(self.lengths), device=self.lengths.device)
        self.keys[sequences, :, self.lengths] = keys.squeeze(2)
        self.values[sequences, :, self.lengths] = values.squeeze(2)
        self.lengths += 1
        self.max_length += 1

    def _check_capacity(self, tokens: int) -> None:
        if tokens > self.keys.shape[2]:
            raise ValueError(f"{tokens} tokens do not fit a cache of capacity {self.keys.shape[2]}; make it larger")


def attend_cached(q: Tensor, cache: LayerCache) -> Tensor:
    """Attention of one new token per sequence, after its own key was appended: q [B, Hq, 1, d] -> [B, Hq, 1, d]."""
    batch_size, heads, tokens, head_dim = q.shape
    if tokens != 1:
        raise ValueError(f"attend_cached takes one token per sequence, got {tokens}")
    keys, values = cache.keys[:, :, : cache.max_length], cache.values[:, :, : cache.max_length]
    # the query heads that share a key head become its queries: grouped-query attention without expanding keys
    grouped = q.reshape(batch_size, keys.shape[1], heads // keys.shape[1], head_dim)
    mask = None
    if not cache.equal_lengths:
        mask = (torch.arange(cache.max_length, device=q.device) < cache.lengths[:, None])[:, None, None, :]
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(batch_size, heads, 1, head_dim)
