"""How the CPU kernel splits a mask into flash calls: as few launches as possible without padding small calls much.

The base calls are causal, one for the whole batch or one for each segment. The extra calls add what a rule sees beyond
the causal past; a query is in one of them at most. All indices are in kernel order (mask_blocks.py).
Letters: B sequences, T positions, H heads, d head_dim, G blocks of one call, Q its queries, K its keys.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aki_megatron.attention.mask_blocks import MaskBlocks
from aki_megatron.attention.token_segments import Ints

SMALL_PAIRS = 4096
"""Rectangles of fewer pairs than this share a call with others; above it the kernel outweighs the launch."""
SMALL_SEGMENT = 256
"""Segments shorter than this share a call with those of exactly their length."""


@dataclass(frozen=True)
class SlicedCall:
    """One block, or the same block of every sequence, reached by slices: no copy."""

    batch: slice
    query_slice: slice
    key_slice: slice
    causal: bool
    mask: None = None

    def queries(self, x: Tensor) -> Tensor:
        """[B, H, T, ...] -> view [G, H, Q, ...]"""
        return x[self.batch, :, self.query_slice]

    def keys(self, x: Tensor) -> Tensor:
        """[B, H, T, d] -> view [G, H, K, d]"""
        return x[self.batch, :, self.key_slice]

    def put_queries(self, x: Tensor, value: Tensor) -> None:
        """Overwrite the queries of x [B, H, T, ...]."""
        self.queries(x).copy_(value)

    def add_queries(self, x: Tensor, value: Tensor) -> None:
        """Add to the queries of x [B, H, T, d]."""
        self.queries(x).add_(value)

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """Add to the keys of x [B, H, T, d]."""
        self.keys(x).add_(value)


@dataclass(frozen=True)
class GatheredCall:
    """G blocks of one shape, gathered into one call.

    query_index  [G, Q] indices in kernel order, each at most once
    key_index    [G, K] indices in kernel order; several blocks may share a key
    mask         additive float [G, 1, 1, K], -inf on keys that only pad the shape; None when there are none
    """

    query_index: Tensor
    key_index: Tensor
    causal: bool
    mask: Tensor | None = None

    def queries(self, x: Tensor) -> Tensor:
        """Token-major [B, H, T, ...] -> copy [G, H, Q, ...]"""
        return _gather(x, self.query_index)

    def keys(self, x: Tensor) -> Tensor:
        """Token-major [B, H, T, d] -> copy [G, H, K, d]"""
        return _gather(x, self.key_index)

    def put_queries(self, x: Tensor, value: Tensor) -> None:
        """Overwrite the queries of token-major x [B, H, T, ...]."""
        flat_tokens(x).index_copy_(0, self.query_index.flatten(), _tokens(value, x.dtype))

    def add_queries(self, x: Tensor, value: Tensor) -> None:
        """Add to the queries of token-major x [B, H, T, d]."""
        flat_tokens(x).index_add_(0, self.query_index.flatten(), _tokens(value, x.dtype))

    def add_keys(self, x: Tensor, value: Tensor) -> None:
        """Add to the keys of token-major x [B, H, T, d]."""
        flat_tokens(x).index_add_(0, self.key_index.flatten(), _tokens(value, x.dtype))


Call = SlicedCall | GatheredCall


@dataclass(frozen=True)
class CpuPlan:
    """Everything the CPU kernel needs of a mask.

    order      [B * T] or None: flat position at each index of kernel order
    inverse    [B * T] or None: index in kernel order of each flat position
    one_base   True when the base is one call over the whole batch
    base_mask  None, or an additive mask [B, 1, T, T] for that call, which is causal otherwise
    base       otherwise: causal calls, each query in one at most
    extra      calls to merge in, each query in one at most
    padding    sequence and position of tokens in no segment; the call of ``one_base`` covers them all the same
    empty      those of them that see nothing: their output is 0
    """

    order: Tensor | None
    inverse: Tensor | None
    one_base: bool
    base_mask: Tensor | None
    base: tuple[Call, ...]
    extra: tuple[Call, ...]
    padding: tuple[Tensor, Tensor]
    empty: tuple[Tensor, Tensor]

    @property
    def gathers(self) -> bool:
        """Whether some call takes tokens by index, which needs them to be the slow dimension in memory."""
        return self.order is not None or any(isinstance(call, GatheredCall) for call in (*self.base, *self.extra))


def flat_tokens(x: Tensor) -> Tensor:
    """View [B * T, H, ...] of token-major x [B, H, T, ...]."""
    tokens = x.transpose(1, 2)
    return tokens.view(-1, *tokens.shape[2:])


def token_major(x: Tensor) -> Tensor:
    """x [B, H, T, ...], copied only if its tokens cannot be reached by one index as ``flat_tokens`` does."""
    tokens = x.shape[2]
    if x.stride(-1) == 1 and (x.shape[0] == 1 or tokens == 1 or x.stride(0) == tokens * x.stride(2)):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _tokens(value: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, H, Q, ...] -> [G * Q, H, ...]"""
    return value.transpose(1, 2).flatten(0, 1).to(dtype)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    flat = flat_tokens(x)
    return flat.index_select(0, index.flatten()).view(*index.shape, *flat.shape[1:]).transpose(1, 2)


def plan_merged(blocks: MaskBlocks) -> CpuPlan:
    """The flash calls of a mask, to be merged by log-sum-exp."""
    order = inverse = None
    if blocks.order is not None:
        order = torch.from_numpy(blocks.order)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
    one_base = blocks.one_segment_per_sequence
    groups = blocks.padding_queries
    padding_calls = [GatheredCall(_index(group.queries[None]), _index(group.keys[None]), False) for group in groups]
    empty = blocks.padding
    if groups:
        empty = np.setdiff1d(empty, np.concatenate([group.queries for group in groups]))
    return CpuPlan(
        order,
        inverse,
        one_base,
        None,
        base=() if one_base else tuple(_base_calls(blocks)),
        extra=(*_rectangle_calls(blocks), *_full_block_calls(blocks), *padding_calls),
        padding=_sequence_and_position(blocks.padding, blocks.length),
        empty=_sequence_and_position(empty, blocks.length),
    )


def plan_masked(mask: Tensor, dtype: torch.dtype) -> CpuPlan:
    """One call with the whole bool mask [B, T, T]: the fastest while a sequence fits one key block of the kernel."""
    empty = ~mask.any(-1)
    # the kernel makes NaN of an empty query: let it see all, its output is overwritten
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~(mask | empty[..., None]), -torch.inf)
    sequence, position = empty.nonzero(as_tuple=True)
    where = (sequence, position)
    return CpuPlan(None, None, True, bias[:, None], base=(), extra=(), padding=where, empty=where)


def _index(indices: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(indices))


def _sequence_and_position(indices: Ints, length: int) -> tuple[Tensor, Tensor]:
    sequence, position = np.divmod(indices, max(length, 1))
    return _index(sequence), _index(position)


def _sliced(sequence: int, start: int, end: int, low: int, high: int, causal: bool) -> SlicedCall:
    return SlicedCall(slice(sequence, sequence + 1), slice(start, end), slice(low, high), causal)


def _base_calls(blocks: MaskBlocks) -> list[Call]:
    """One causal call for each segment; short segments of one length share it, which changes no bit of the result."""
    calls: list[Call] = []
    lengths = blocks.segments[:, 1] - blocks.segments[:, 0]
    for size in np.unique(lengths):
        starts = blocks.segments[lengths == size, 0]
        if size < SMALL_SEGMENT and len(starts) > 1:
            index = _index(starts[:, None] + np.arange(size))
            calls.append(GatheredCall(index, index, True))
            continue
        for start in starts.tolist():
            sequence, first = divmod(start, blocks.length)
            last = first + int(size)
            calls.append(_sliced(sequence, first, last, first, last, True))
    return calls


def _full_block_calls(blocks: MaskBlocks) -> list[Call]:
    """Above the diagonal of a full block: causal when queries and keys are taken in reverse order."""
    calls: list[Call] = []
    lengths = blocks.full_blocks[:, 1] - blocks.full_blocks[:, 0]
    for size in np.unique(lengths):
        backwards = blocks.full_blocks[lengths == size, 1:] - 1 - np.arange(size)
        calls.append(GatheredCall(_index(backwards[:, 1:]), _index(backwards[:, :-1]), True))
    return calls


def _rectangle_calls(blocks: MaskBlocks) -> list[Call]:
    spans, key_spans, keys = blocks.query_spans, blocks.key_spans, blocks.keys
    if not len(spans):
        return []
    first, last = keys[key_spans[:, 0]], keys[key_spans[:, 1] - 1] + 1
    num_queries, num_keys = spans[:, 1] - spans[:, 0], key_spans[:, 1] - key_spans[:, 0]
    contiguous = last - first == num_keys
    if blocks.batch_size > 1 and len(spans) == blocks.batch_size and contiguous.all():
        offsets = np.arange(len(spans))[:, None] * blocks.length
        corners = np.stack((spans[:, 0], spans[:, 1], first, last), axis=1) - offsets
        if (corners == corners[0]).all():
            start, end, low, high = corners[0].tolist()
            if min(start, low) >= 0 and max(end, high) <= blocks.length:
                return [SlicedCall(slice(None), slice(start, end), slice(low, high), False)]
    calls: list[Call] = []
    large = num_queries * num_keys >= SMALL_PAIRS
    for n in np.flatnonzero(large).tolist():
        if contiguous[n]:
            sequence, start = divmod(int(spans[n, 0]), blocks.length)
            low = int(first[n]) % blocks.length
            calls.append(_sliced(sequence, start, start + int(num_queries[n]), low, low + int(num_keys[n]), False))
        else:
            calls.append(_gathered(blocks, np.array([n]), int(num_queries[n]), int(num_keys[n])))
    small = np.flatnonzero(~large)
    small = small[np.lexsort((-num_keys[small], num_queries[small]))]
    return calls + _shared_calls(blocks, small, num_queries, num_keys)


def _shared_calls(blocks: MaskBlocks, small: Ints, num_queries: Ints, num_keys: Ints) -> list[Call]:
    """Small rectangles, sorted by queries and descending keys, in calls whose padding is at most half of the keys."""
    calls: list[Call] = []
    group: list[int] = []

    def flush() -> None:
        if group:
            calls.append(_gathered(blocks, np.array(group), int(num_queries[group[0]]), int(num_keys[group[0]])))

    for n in small.tolist():
        if group and (num_queries[n] != num_queries[group[0]] or 3 * num_keys[n] < 2 * num_keys[group[0]]):
            flush()
            group = []
        group.append(n)
    flush()
    return calls


def _gathered(blocks: MaskBlocks, members: Ints, num_queries: int, num_keys: int) -> GatheredCall:
    """Rectangles with equally many queries as one call; with fewer keys they are padded by their masked last key."""
    query_index = blocks.query_spans[members, :1] + np.arange(num_queries)
    low, high = blocks.key_spans[members, :1], blocks.key_spans[members, 1:]
    entry = np.minimum(low + np.arange(num_keys), high - 1)
    padded = low + np.arange(num_keys) >= high
    mask = None
    if padded.any():
        mask = torch.zeros(len(members), 1, 1, num_keys).masked_fill_(
            torch.from_numpy(padded)[:, None, None], -torch.inf
        )
    return GatheredCall(_index(query_index), _index(blocks.keys[entry]), False, mask)
