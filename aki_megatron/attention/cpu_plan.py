"""How the CPU kernel cuts a layout into flash calls: few calls, no call smaller than it must be.

The base calls are causal, one for the whole rectangle or one for each segment. The extra calls add what a rule sees
beyond the causal past; a row is in one of them at most. All places are working places (pieces.py).
Letters: B rows, T tokens, H heads, d head width, G pieces of one call, R its rows, C its columns.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aki_megatron.attention.mask_blocks import MaskBlocks
from aki_megatron.attention.token_segments import Ints

SMALL_PAIRS = 4096
"""MaskBlocks of fewer pairs than this share a call with others; above it the kernel outweighs the price of a call."""
SMALL_SPAN = 256
"""Segments shorter than this share a call with those of exactly their length."""


@dataclass(frozen=True)
class SlicedCall:
    """One piece, or the same piece of every row, reached by slices: no copy."""

    batch: slice
    row_slice: slice
    column_slice: slice
    causal: bool
    mask: None = None

    def rows(self, x: Tensor) -> Tensor:
        """[B, H, T, ...] -> view [G, H, R, ...]"""
        return x[self.batch, :, self.row_slice]

    def columns(self, x: Tensor) -> Tensor:
        """[B, H, T, d] -> view [G, H, C, d]"""
        return x[self.batch, :, self.column_slice]

    def put_rows(self, x: Tensor, value: Tensor) -> None:
        """Overwrite the rows of x [B, H, T, ...]."""
        self.rows(x).copy_(value)

    def add_rows(self, x: Tensor, value: Tensor) -> None:
        """Add to the rows of x [B, H, T, d]."""
        self.rows(x).add_(value)

    def add_columns(self, x: Tensor, value: Tensor) -> None:
        """Add to the columns of x [B, H, T, d]."""
        self.columns(x).add_(value)


@dataclass(frozen=True)
class GatheredCall:
    """G pieces of one shape, gathered into one call.

    row_index     [G, R] working places, each at most once
    column_index  [G, C] working places; several pieces may share a column
    mask          additive float [G, 1, 1, C], -inf on columns that only fill up the shape; None when there are none
    """

    row_index: Tensor
    column_index: Tensor
    causal: bool
    mask: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        """Token-major [B, H, T, ...] -> copy [G, H, R, ...]"""
        return _gather(x, self.row_index)

    def columns(self, x: Tensor) -> Tensor:
        """Token-major [B, H, T, d] -> copy [G, H, C, d]"""
        return _gather(x, self.column_index)

    def put_rows(self, x: Tensor, value: Tensor) -> None:
        """Overwrite the rows of token-major x [B, H, T, ...]."""
        flat_tokens(x).index_copy_(0, self.row_index.flatten(), _tokens(value, x.dtype))

    def add_rows(self, x: Tensor, value: Tensor) -> None:
        """Add to the rows of token-major x [B, H, T, d]."""
        flat_tokens(x).index_add_(0, self.row_index.flatten(), _tokens(value, x.dtype))

    def add_columns(self, x: Tensor, value: Tensor) -> None:
        """Add to the columns of token-major x [B, H, T, d]."""
        flat_tokens(x).index_add_(0, self.column_index.flatten(), _tokens(value, x.dtype))


Call = SlicedCall | GatheredCall


@dataclass(frozen=True)
class CpuPlan:
    """Everything the CPU kernel needs of a layout.

    order    [B * T] or None: flat position at each working place
    inverse  [B * T] or None: working place of each flat position
    whole    True when the base is one call over all rows
    mask     None, or an additive mask [B, 1, T, T] for that call, which is causal otherwise
    base     otherwise: causal calls, each row in one at most
    extra    calls to merge in, each row in one at most
    dead     rows b and tokens t in no segment; the call of ``whole`` runs over them all the same
    silent   those of them that see nothing: their output is 0
    """

    order: Tensor | None
    inverse: Tensor | None
    whole: bool
    mask: Tensor | None
    base: tuple[Call, ...]
    extra: tuple[Call, ...]
    dead: tuple[Tensor, Tensor]
    silent: tuple[Tensor, Tensor]

    @property
    def gathers(self) -> bool:
        """Whether some call takes tokens by index, which needs them to be the slow dimension in memory."""
        return self.order is not None or any(isinstance(call, GatheredCall) for call in (*self.base, *self.extra))

    @property
    def calls(self) -> int:
        """Number of flash calls of one forward pass."""
        return self.whole + len(self.base) + len(self.extra)


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
    """[G, H, R, ...] -> [G * R, H, ...]"""
    return value.transpose(1, 2).flatten(0, 1).to(dtype)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    flat = flat_tokens(x)
    return flat.index_select(0, index.flatten()).view(*index.shape, *flat.shape[1:]).transpose(1, 2)


def plan_calls(pieces: MaskBlocks) -> CpuPlan:
    """The flash calls of a layout."""
    order = inverse = None
    if pieces.order is not None:
        order = torch.from_numpy(pieces.order)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))
    whole = pieces.one_span_per_row
    strays = [GatheredCall(_index(stray.rows[None]), _index(stray.columns[None]), False) for stray in pieces.strays]
    heard = np.concatenate([stray.rows for stray in pieces.strays]) if strays else pieces.dead[:0]
    return CpuPlan(
        order,
        inverse,
        whole,
        None,
        base=() if whole else tuple(_base(pieces)),
        extra=(*_rectangles(pieces), *_triangles(pieces), *strays),
        dead=_row_and_token(pieces.dead, pieces.width),
        silent=_row_and_token(np.setdiff1d(pieces.dead, heard) if strays else pieces.dead, pieces.width),
    )


def plan_mask(mask: Tensor, dtype: torch.dtype) -> CpuPlan:
    """One call with the whole bool mask [B, T, T]: the fastest way while a row fits one key block of the kernel."""
    silent = ~mask.any(-1)
    # the kernel makes NaN of an empty row: let it see all, its output is overwritten
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~(mask | silent[..., None]), -torch.inf)
    row, token = silent.nonzero(as_tuple=True)
    places = (row, token)
    return CpuPlan(None, None, True, bias[:, None], base=(), extra=(), dead=places, silent=places)


def _index(places: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(places))


def _row_and_token(places: Ints, width: int) -> tuple[Tensor, Tensor]:
    row, token = np.divmod(places, max(width, 1))
    return _index(row), _index(token)


def _window(row: int, start: int, end: int, low: int, high: int, causal: bool) -> SlicedCall:
    return SlicedCall(slice(row, row + 1), slice(start, end), slice(low, high), causal)


def _base(pieces: MaskBlocks) -> list[Call]:
    """One causal call for each segment; short segments of one length share it, which changes no bit of the result."""
    calls: list[Call] = []
    length = pieces.spans[:, 1] - pieces.spans[:, 0]
    for size in np.unique(length):
        starts = pieces.spans[length == size, 0]
        if size < SMALL_SPAN and len(starts) > 1:
            index = _index(starts[:, None] + np.arange(size))
            calls.append(GatheredCall(index, index, True))
            continue
        for start in starts.tolist():
            row, first = divmod(start, pieces.width)
            last = first + int(size)
            calls.append(_window(row, first, last, first, last, True))
    return calls


def _triangles(pieces: MaskBlocks) -> list[Call]:
    """Blocks: what lies above the diagonal is causal when rows and columns are read backwards."""
    calls: list[Call] = []
    length = pieces.blocks[:, 1] - pieces.blocks[:, 0]
    for size in np.unique(length):
        backwards = pieces.blocks[length == size, 1:] - 1 - np.arange(size)
        calls.append(GatheredCall(_index(backwards[:, 1:]), _index(backwards[:, :-1]), True))
    return calls


def _rectangles(pieces: MaskBlocks) -> list[Call]:
    rows, cols, columns = pieces.row_spans, pieces.col_spans, pieces.columns
    if not len(rows):
        return []
    first, last = columns[cols[:, 0]], columns[cols[:, 1] - 1] + 1
    height, breadth = rows[:, 1] - rows[:, 0], cols[:, 1] - cols[:, 0]
    solid = last - first == breadth
    if pieces.rows > 1 and len(rows) == pieces.rows and solid.all():
        corners = np.stack((rows[:, 0], rows[:, 1], first, last), axis=1) - np.arange(len(rows))[:, None] * pieces.width
        if (corners == corners[0]).all():
            start, end, low, high = corners[0].tolist()
            if min(start, low) >= 0 and max(end, high) <= pieces.width:
                return [SlicedCall(slice(None), slice(start, end), slice(low, high), False)]
    calls: list[Call] = []
    alone = height * breadth >= SMALL_PAIRS
    for n in np.flatnonzero(alone).tolist():
        if solid[n]:
            row, start = divmod(int(rows[n, 0]), pieces.width)
            low = int(first[n]) % pieces.width
            calls.append(_window(row, start, start + int(height[n]), low, low + int(breadth[n]), False))
        else:
            calls.append(_bundle(pieces, np.array([n]), int(height[n]), int(breadth[n])))
    small = np.flatnonzero(~alone)
    small = small[np.lexsort((-breadth[small], height[small]))]
    return calls + _shared(pieces, small, height, breadth)


def _shared(pieces: MaskBlocks, small: Ints, height: Ints, breadth: Ints) -> list[Call]:
    """Small rectangles, sorted by rows and falling columns, in calls that are at most half as much again too wide."""
    calls: list[Call] = []
    group: list[int] = []
    for n in small.tolist():
        if group and (height[n] != height[group[0]] or 3 * breadth[n] < 2 * breadth[group[0]]):
            calls.append(_bundle(pieces, np.array(group), int(height[group[0]]), int(breadth[group[0]])))
            group = []
        group.append(n)
    if group:
        calls.append(_bundle(pieces, np.array(group), int(height[group[0]]), int(breadth[group[0]])))
    return calls


def _bundle(pieces: MaskBlocks, members: Ints, height: int, breadth: int) -> GatheredCall:
    """Rectangles of one height as one call, narrower ones filled up with masked repetitions of their last column."""
    row_index = pieces.row_spans[members, :1] + np.arange(height)
    low, high = pieces.col_spans[members, :1], pieces.col_spans[members, 1:]
    entry = np.minimum(low + np.arange(breadth), high - 1)
    filling = low + np.arange(breadth) >= high
    mask = None
    if filling.any():
        mask = torch.zeros(len(members), 1, 1, breadth).masked_fill_(
            torch.from_numpy(filling)[:, None, None], -torch.inf
        )
    return GatheredCall(_index(row_index), _index(pieces.columns[entry]), False, mask)
