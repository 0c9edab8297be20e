"""How the CUDA kernel cuts a layout into calls of variable-length flash attention.

A call runs many pieces at once: piece n attends rows [cu_rows[n], cu_rows[n + 1]) to columns of the same kind. A causal
piece is aligned bottom right: its last row sees all its columns, each row before it one column less.

gathered  Every row is in exactly one piece, because the columns of a piece may come in any order (positions are already
          rotated into the keys). Rows with look-ahead: [columns ahead | causal past | themselves], causal; rows of a
          block: [past | block], full. No merge; PyTorch differentiates it. The price is copies of keys and values.
merged    One causal call for all segments, without copies, and one or two calls for what lies beyond, merged by
          log-sum-exp. For many turns, where ``gathered`` would copy the history of a turn again and again.

Letters: B rows, T tokens, N rows of a call, K its columns, P its pieces.
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
    """One call: ``rows`` [N] and ``columns`` [K] flat positions, None when they are all B * T in order."""

    rows: Tensor | None
    columns: Tensor | None
    cu_rows: Tensor
    cu_columns: Tensor
    max_rows: int
    max_columns: int
    causal: bool


@dataclass(frozen=True)
class VarlenPlan:
    """The calls of a layout. ``merged``: the first call is the base, rows of the others come a second time."""

    calls: tuple[VarlenCall, ...]
    merged: bool


Piece = tuple[Ints, Ints]
"""Rows and columns, as working places."""


def plan_varlen(pieces: MaskBlocks, device: torch.device, *, merged: bool | None = None) -> VarlenPlan:
    """Calls on ``device``; ``merged`` None takes the form that GATHER_LIMIT says."""
    if merged is None:
        causal, full = gathered_pieces(pieces)
        copied = sum(len(columns) for _, columns in (*causal, *full))
        merged = bool(full or len(causal) > len(pieces.spans)) and copied > GATHER_LIMIT * _live(pieces)
    if merged:
        groups = [(_span_pieces(pieces), True), (_ahead(pieces), False), (_triangles(pieces), True)]
    else:
        causal, full = gathered_pieces(pieces)
        groups = [(causal, True), (full, False)]
    calls = tuple(_call(pieces, group, causal, device) for group, causal in groups if group)
    return VarlenPlan(calls, merged)


def _live(pieces: MaskBlocks) -> int:
    return int((pieces.spans[:, 1] - pieces.spans[:, 0]).sum())


def _strays(pieces: MaskBlocks) -> list[Piece]:
    return [(stray.rows, stray.columns) for stray in pieces.strays]


def gathered_pieces(pieces: MaskBlocks) -> tuple[list[Piece], list[Piece]]:
    """Causal and full pieces such that every row that sees something is in exactly one."""
    causal: list[Piece] = []
    full: list[Piece] = _strays(pieces)
    ahead = [
        (int(start), int(end), pieces.columns[low:high])
        for (start, end), (low, high) in zip(pieces.row_spans, pieces.col_spans, strict=True)
    ]
    special = sorted([*ahead, *((int(start), int(end), None) for start, end in pieces.blocks)], key=lambda it: it[0])
    following = iter([*special, (1 << 62, 0, None)])
    start, end, columns = next(following)
    for first, last in pieces.spans.tolist():
        done = first
        while start < last:
            if done < start:
                causal.append((np.arange(done, start), np.arange(first, start)))
            past = np.arange(first, end)
            (full if columns is None else causal).append(
                (np.arange(start, end), past if columns is None else np.concatenate((columns, past)))
            )
            done = end
            start, end, columns = next(following)
        if done < last:
            causal.append((np.arange(done, last), np.arange(first, last)))
    return causal, full


def _span_pieces(pieces: MaskBlocks) -> list[Piece]:
    return [(np.arange(first, last), np.arange(first, last)) for first, last in pieces.spans.tolist()]


def _ahead(pieces: MaskBlocks) -> list[Piece]:
    """Rectangles and strays: full."""
    spans = zip(pieces.row_spans, pieces.col_spans, strict=True)
    return [(np.arange(start, end), pieces.columns[low:high]) for (start, end), (low, high) in spans] + _strays(pieces)


def _triangles(pieces: MaskBlocks) -> list[Piece]:
    """Blocks above the diagonal, read backwards: causal."""
    return [
        (np.arange(last - 2, first - 1, -1), np.arange(last - 1, first, -1)) for first, last in pieces.blocks.tolist()
    ]


def _call(pieces: MaskBlocks, group: list[Piece], causal: bool, device: torch.device) -> VarlenCall:
    """MaskBlocks laid end to end."""
    rows, cu_rows, max_rows = _laid_out(pieces, [rows for rows, _ in group], device)
    columns, cu_columns, max_columns = _laid_out(pieces, [columns for _, columns in group], device)
    return VarlenCall(rows, columns, cu_rows, cu_columns, max_rows, max_columns, causal)


def _laid_out(pieces: MaskBlocks, lists: list[Ints], device: torch.device) -> tuple[Tensor | None, Tensor, int]:
    """Flat positions of the listed working places, int32 offsets [P + 1] of the lists, and the longest list."""
    places = np.concatenate(lists)
    flat = places if pieces.order is None else pieces.order[places]
    lengths = np.array([len(one) for one in lists])
    offsets = torch.from_numpy(np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)).to(device)
    size = pieces.rows * pieces.width
    whole = len(flat) == size and bool(np.all(flat == np.arange(size)))
    return None if whole else torch.from_numpy(flat).to(device), offsets, int(lengths.max())
