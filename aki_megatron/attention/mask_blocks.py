"""The mask as blocks: ranges of queries and keys that a flash kernel takes as they are.

Kernel order: the order of the B * T tokens in which the kernels run. Mostly a token's flat position b * T + t; where a
rule or padding inside a segment needs another order, the tokens of each sequence are permuted once, valid tokens first.
Letters: B sequences, T positions, M valid tokens, S segments, K rectangles or blocks.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from aki_megatron.attention.rules import MaskSpec
from aki_megatron.attention.token_segments import Bools, Ints, TokenSegments


@dataclass(frozen=True)
class PaddingQueries:
    """PAD queries inside a segment: they see the valid tokens before them, nothing sees them."""

    queries: Ints
    keys: Ints


@dataclass(frozen=True)
class MaskBlocks:
    """The whole mask, in kernel order.

    order            [B * T] or None: flat position of the token at each index of the kernel order; None: identity
    segments         [S, 2] ranges that are causal inside, one for each segment
    query_spans      [K, 2] these queries see, beyond the causal past, ...
    key_spans        [K, 2] ... these entries of ``keys``; a query is in one rectangle or full block at most
    keys             indices in kernel order
    full_blocks      [K, 2] ranges in which every token sees every token
    padding_queries  PAD queries inside segments (a batch of this project has none)
    padding          indices outside every segment
    """

    batch_size: int
    length: int
    order: Ints | None
    segments: Ints
    query_spans: Ints
    key_spans: Ints
    keys: Ints
    full_blocks: Ints
    padding_queries: tuple[PaddingQueries, ...]
    padding: Ints

    @cached_property
    def one_segment_per_sequence(self) -> bool:
        """True when every sequence is one segment from its first position on, or empty: one causal call does all."""
        starts = self.segments[:, 0]
        return bool(np.all(starts % self.length == 0))

    @cached_property
    def num_pairs(self) -> int:
        """Number of (query, key) pairs that attend."""
        segment, block = (spans[:, 1] - spans[:, 0] for spans in (self.segments, self.full_blocks))
        rectangles = (self.query_spans[:, 1] - self.query_spans[:, 0]) * (self.key_spans[:, 1] - self.key_spans[:, 0])
        padding = sum(len(group.queries) * len(group.keys) for group in self.padding_queries)
        causal, upper = (segment * (segment + 1) // 2).sum(), (block * (block - 1) // 2).sum()
        return int(causal + rectangles.sum() + upper) + padding


def build_blocks(tokens: TokenSegments, spec: MaskSpec, pad_queries: Ints) -> MaskBlocks:
    """Put the mask of a rule into kernel order.

    pad_queries  [P, 2] flat position and segment id of PAD tokens that lie in a segment
    """
    spans = np.stack((tokens.segments.starts, tokens.segments.ends), axis=1)
    positions, size = tokens.positions, tokens.batch_size * tokens.length
    valid = np.zeros(size, dtype=np.bool_)
    order: Ints | None = None
    contiguous = bool(np.all(positions[spans[:, 1] - 1] - positions[spans[:, 0]] == spans[:, 1] - spans[:, 0] - 1))
    if spec.order is None and contiguous:
        index = positions
        valid[positions] = True
    else:
        sequence = positions // tokens.length
        index = sequence * tokens.length + np.arange(len(positions)) - np.searchsorted(sequence, sequence)
        valid[index] = True
        order = _full_order(tokens, spec.order, index, valid)
    return MaskBlocks(
        tokens.batch_size,
        tokens.length,
        order,
        segments=_in_kernel_order(index, spans),
        query_spans=_in_kernel_order(index, spec.query_spans),
        key_spans=spec.key_spans,
        keys=index[spec.keys],
        full_blocks=_in_kernel_order(index, spec.full_blocks),
        padding_queries=_padding_queries(tokens, spec.order, index, order, pad_queries) if len(pad_queries) else (),
        padding=np.flatnonzero(~valid),
    )


def _in_kernel_order(index: Ints, spans: Ints) -> Ints:
    """Spans of valid tokens as ranges of kernel order, in which they are contiguous."""
    return np.stack((index[spans[:, 0]], index[spans[:, 1] - 1] + 1), axis=1) if len(spans) else spans


def _full_order(tokens: TokenSegments, rule_order: Ints | None, index: Ints, valid: Bools) -> Ints:
    """The flat position at each of the B * T indices: valid tokens of a sequence first, its padding after them."""
    order = np.empty(len(valid), dtype=np.int64)
    order[index] = tokens.positions if rule_order is None else tokens.positions[rule_order]
    is_padding = np.ones(len(valid), dtype=np.bool_)
    is_padding[tokens.positions] = False
    # both lists ascend and each sequence has as many of one as of the other, so they pair up sequence by sequence
    order[~valid] = np.flatnonzero(is_padding)
    return order


def _padding_queries(
    tokens: TokenSegments, rule_order: Ints | None, index: Ints, order: Ints | None, pad_queries: Ints
) -> tuple[PaddingQueries, ...]:
    """PAD queries grouped by what they see: all valid tokens of their segment that precede them."""
    index_of_token = index.copy()
    if rule_order is not None:
        index_of_token[rule_order] = index
    index_of_position = np.arange(tokens.batch_size * tokens.length)
    if order is not None:
        index_of_position[order] = np.arange(len(order))
    segments = {
        (int(tokens.positions[start]) // tokens.length, int(tokens.segment_ids[start])): (int(start), int(end))
        for start, end in zip(tokens.segments.starts, tokens.segments.ends, strict=True)
    }
    queries: dict[tuple[int, int], list[int]] = {}
    for position, segment_id in pad_queries:
        start, end = segments.get((int(position) // tokens.length, int(segment_id)), (0, 0))
        end = min(end, int(np.searchsorted(tokens.positions, position)))
        if end > start:
            queries.setdefault((start, end), []).append(int(index_of_position[position]))
    return tuple(PaddingQueries(np.array(group), index_of_token[start:end]) for (start, end), group in queries.items())
