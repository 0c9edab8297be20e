"""How the CUDA kernel splits a mask into calls of variable-length flash attention.

A call runs many blocks at once: block n attends queries [cu_queries[n], cu_queries[n + 1]) to keys of the same kind. A
causal block is aligned bottom right: its last query sees all its keys, each query before it one key less.

gathered  Every query is in exactly one block, because the keys of a block may come in any order (positions are already
          rotated into the keys). Queries with look-ahead: [keys ahead | causal past | themselves], causal; queries of a
          full block: [past | block], full. No merge; PyTorch differentiates it. The price is copies of keys and values.
merged    One causal call for all segments, without copies, and one or two calls for what lies beyond, merged by
          log-sum-exp. For many turns, where ``gathered`` would copy the history of a turn again and again.

Letters: B sequences, T positions, Q queries of a call, K its keys, N its blocks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aki_megatron.attention.mask_blocks import MaskBlocks
from aki_megatron.attention.token_segments import Ints

GATHER_LIMIT = 2.0
"""Gathered keys per token above which ``merged`` is taken. One turn of AKI (656 tokens) needs 1.41."""


@dataclass(frozen=True)
class VarlenCall:
    """One call: ``queries`` [Q] and ``keys`` [K] flat positions, None when they are all B * T in order."""

    queries: Tensor | None
    keys: Tensor | None
    cu_queries: Tensor
    cu_keys: Tensor
    max_queries: int
    max_keys: int
    causal: bool


@dataclass(frozen=True)
class VarlenPlan:
    """The calls of a mask. ``merged``: the first call is the base, queries of the others come a second time."""

    calls: tuple[VarlenCall, ...]
    merged: bool


Block = tuple[Ints, Ints]
"""Queries and keys, in kernel order."""


def plan_varlen(blocks: MaskBlocks, device: torch.device, *, merged: bool | None = None) -> VarlenPlan:
    """Calls on ``device``; ``merged`` forces one of the two forms, None takes the one that GATHER_LIMIT says."""
    if merged is None:
        causal, full = _gathered_blocks(blocks)
        copied = sum(len(keys) for _, keys in (*causal, *full))
        merged = bool(full or len(causal) > len(blocks.segments)) and copied > GATHER_LIMIT * _num_valid(blocks)
    if merged:
        groups = [(_segment_blocks(blocks), True), (_ahead(blocks), False), (_above_diagonal(blocks), True)]
    else:
        causal, full = _gathered_blocks(blocks)
        groups = [(causal, True), (full, False)]
    calls = tuple(_call(blocks, group, causal, device) for group, causal in groups if group)
    return VarlenPlan(calls, merged)


def _num_valid(blocks: MaskBlocks) -> int:
    return int((blocks.segments[:, 1] - blocks.segments[:, 0]).sum())


def _padding_blocks(blocks: MaskBlocks) -> list[Block]:
    return [(group.queries, group.keys) for group in blocks.padding_queries]


def _gathered_blocks(blocks: MaskBlocks) -> tuple[list[Block], list[Block]]:
    """Causal and full blocks such that every query that sees something is in exactly one."""
    causal: list[Block] = []
    full: list[Block] = _padding_blocks(blocks)
    ahead = [
        (int(start), int(end), blocks.keys[low:high])
        for (start, end), (low, high) in zip(blocks.query_spans, blocks.key_spans, strict=True)
    ]
    special = sorted(
        [*ahead, *((int(start), int(end), None) for start, end in blocks.full_blocks)], key=lambda span: span[0]
    )
    following = iter([*special, (1 << 62, 0, None)])
    start, end, keys = next(following)
    for first, last in blocks.segments.tolist():
        done = first
        while start < last:
            if done < start:
                causal.append((np.arange(done, start), np.arange(first, start)))
            past = np.arange(first, end)
            (full if keys is None else causal).append(
                (np.arange(start, end), past if keys is None else np.concatenate((keys, past)))
            )
            done = end
            start, end, keys = next(following)
        if done < last:
            causal.append((np.arange(done, last), np.arange(first, last)))
    return causal, full


def _segment_blocks(blocks: MaskBlocks) -> list[Block]:
    return [(np.arange(first, last), np.arange(first, last)) for first, last in blocks.segments.tolist()]


def _ahead(blocks: MaskBlocks) -> list[Block]:
    """Rectangles and padding queries: full."""
    spans = zip(blocks.query_spans, blocks.key_spans, strict=True)
    rectangles = [(np.arange(start, end), blocks.keys[low:high]) for (start, end), (low, high) in spans]
    return rectangles + _padding_blocks(blocks)


def _above_diagonal(blocks: MaskBlocks) -> list[Block]:
    """Full blocks above the diagonal, in reverse order: causal."""
    return [
        (np.arange(last - 2, first - 1, -1), np.arange(last - 1, first, -1))
        for first, last in blocks.full_blocks.tolist()
    ]


def _call(blocks: MaskBlocks, group: list[Block], causal: bool, device: torch.device) -> VarlenCall:
    """Concatenate blocks."""
    queries, cu_queries, max_queries = _concatenated(blocks, [queries for queries, _ in group], device)
    keys, cu_keys, max_keys = _concatenated(blocks, [keys for _, keys in group], device)
    return VarlenCall(queries, keys, cu_queries, cu_keys, max_queries, max_keys, causal)


def _concatenated(blocks: MaskBlocks, lists: list[Ints], device: torch.device) -> tuple[Tensor | None, Tensor, int]:
    """Flat positions of the listed indices, int32 offsets [N + 1] of the lists, and the longest list."""
    indices = np.concatenate(lists)
    flat = indices if blocks.order is None else blocks.order[indices]
    lengths = np.array([len(one) for one in lists])
    offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)).to(device)
    size = blocks.batch_size * blocks.length
    whole = len(flat) == size and bool(np.all(flat == np.arange(size)))
    return None if whole else torch.from_numpy(flat).to(device), offsets, int(lengths.max())
