"""Generation: the keys and values of one layer, and one new token per sequence over them.

The prompt is prefilled through ``attend`` with its own mask; every later token sees all that is valid in the cache.
That equals recomputation, because a generated position counts as supervised, so no earlier query may see it.
Letters: B sequences, Hq query heads, Hkv key heads, C capacity, d head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class LayerCache:
    """Keys and values [B, Hkv, C, d] of one layer for up to B sequences at a time, of which the first are in use.

    Sequence b holds ``counts[b]`` valid tokens, from position 0 on.
    """

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
        self.counts: list[int] = []
        """Valid tokens of every sequence in use; on the host, so that decoding never waits for the device."""
        self._lengths = torch.zeros(0, dtype=torch.int64, device=device)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence; 0 for an empty cache."""
        return max(self.counts, default=0)

    @property
    def lengths(self) -> Tensor:
        """``counts`` [sequences in use] on the device."""
        return self._lengths

    def fill(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        """Store prefilled prompts, in place of all before.

        keys, values  [B, Hkv, T, d], right padded
        lengths       [B] valid tokens of each sequence
        """
        num_sequences, _, padded_length, _ = keys.shape
        self._check_capacity(padded_length)
        self.keys[:num_sequences, :, :padded_length] = keys
        self.values[:num_sequences, :, :padded_length] = values
        counts = lengths.tolist()
        if not all(0 < count <= padded_length for count in counts):
            raise ValueError(f"prompt lengths {counts} must lie in 1..{padded_length}, the length of the keys given")
        self.counts, self._lengths = counts, lengths.clone()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add one token to every sequence in use: keys and values [B, Hkv, 1, d], after its last valid token."""
        longest, num_sequences = self.max_length, len(self.counts)
        self._check_capacity(longest + 1)
        if min(self.counts) == longest:  # of one length, as one sequence always is: a copy instead of a scatter
            self.keys[:num_sequences, :, longest] = keys.squeeze(2)
            self.values[:num_sequences, :, longest] = values.squeeze(2)
        else:
            sequences = torch.arange(num_sequences, device=self._lengths.device)
            self.keys[sequences, :, self._lengths] = keys.squeeze(2)
            self.values[sequences, :, self._lengths] = values.squeeze(2)
        self._lengths = self._lengths + 1
        self.counts = [count + 1 for count in self.counts]

    def insert(self, other: "LayerCache") -> None:
        """Add the sequences of another cache after those in use; the cache grows where it must."""
        first, length = len(self.counts), other.max_length
        self.reserve(first + len(other.counts), length)
        rows = slice(first, first + len(other.counts))
        self.keys[rows, :, :length] = other.keys[: len(other.counts), :, :length]
        self.values[rows, :, :length] = other.values[: len(other.counts), :, :length]
        self.counts = [*self.counts, *other.counts]
        self._lengths = torch.cat([self._lengths, other._lengths])

    def replace(self, sequence: int, other: "LayerCache") -> None:
        """Put the one sequence of another cache in place of a sequence."""
        length = other.max_length
        self.reserve(len(self.counts), length)
        self.keys[sequence, :, :length] = other.keys[0, :, :length]
        self.values[sequence, :, :length] = other.values[0, :, :length]

    def remove(self, sequence: int) -> None:
        """Drop a sequence; the last one in use takes its place."""
        last, length = len(self.counts) - 1, self.counts[-1]
        if sequence != last:
            self.keys[sequence, :, :length] = self.keys[last, :, :length]
            self.values[sequence, :, :length] = self.values[last, :, :length]
            self.counts[sequence] = length
            self._lengths[sequence] = self._lengths[last]
        self.counts, self._lengths = self.counts[:last], self._lengths[:last]

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences, in this order; one may be chosen several times: the beams of a search."""
        length = self.max_length
        self.counts = [self.counts[number] for number in sequences.tolist()]
        kept = (self.keys[sequences, :, :length], self.values[sequences, :, :length])
        self.reserve(len(self.counts), length)
        self.keys[: len(self.counts), :, :length], self.values[: len(self.counts), :, :length] = kept
        self._lengths = self._lengths[sequences]

    def reserve(self, batch_size: int, capacity: int) -> None:
        """Hold this many sequences and tokens of each; what is too small is at least doubled."""
        rows, heads, tokens, head_dim = self.keys.shape
        if batch_size <= rows and capacity <= tokens:
            return
        rows = rows if batch_size <= rows else max(batch_size, 2 * rows)
        tokens = tokens if capacity <= tokens else max(capacity, 2 * tokens)
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(rows, heads, tokens, head_dim)
            new[: old.shape[0], :, : old.shape[2]] = old
            setattr(self, name, new)

    def _check_capacity(self, tokens: int) -> None:
        if tokens > self.keys.shape[2]:
            raise ValueError(f"{tokens} tokens do not fit a cache of capacity {self.keys.shape[2]}; make it larger")


def attend_cached(q: Tensor, cache: LayerCache) -> Tensor:
    """Attention of one new token per sequence, after its own key was appended: q [B, Hq, 1, d] -> [B, Hq, 1, d]."""
    batch_size, heads, tokens, head_dim = q.shape
    if tokens != 1:
        raise ValueError(f"attend_cached takes one token per sequence, got {tokens}")
    length = cache.max_length
    keys, values = cache.keys[:batch_size, :, :length], cache.values[:batch_size, :, :length]
    # the query heads that share a key head become its queries: grouped-query attention without expanding keys
    grouped = q.reshape(batch_size, keys.shape[1], heads // keys.shape[1], head_dim)
    mask = None
    if min(cache.counts) < length:
        mask = (torch.arange(length, device=q.device) < cache.lengths[:, None])[:, None, None, :]
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).reshape(batch_size, heads, 1, head_dim)
