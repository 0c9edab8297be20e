"""From a rule's look to pieces of work: stretches of rows and columns that a flash kernel takes as they are.

Working places: where a token lies in the [B * T] rows the kernels run over. Mostly its flat position b * T + t; where a
rule or a hole of padding asks for another order, the tokens of each row are permuted once, live tokens first.
Letters: B rows, T tokens, M live tokens, S causal spans, K rectangles or blocks.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from aki_megatron.attention.rules import Look
from aki_megatron.attention.token_segments import Ints, TokenSegments


@dataclass(frozen=True)
class Stray:
    """PAD rows inside a segment: nobody sees them, they see the live tokens before them."""

    rows: Ints
    columns: Ints


@dataclass(frozen=True)
class MaskBlocks:
    """The whole mask, in working places.

    order      [B * T] or None: flat position of the token at each working place; None is the identity
    spans      [S, 2] causal inside: one for each segment
    row_spans  [K, 2] these rows see, beyond the causal past, ...
    col_spans  [K, 2] ... these entries of ``columns``; a row is in one rectangle or block at most
    columns    working places
    blocks     [K, 2] all inside see each other
    strays     PAD rows inside segments (a batch of this project has none)
    dead       working places outside every span
    """

    rows: int
    width: int
    order: Ints | None
    spans: Ints
    row_spans: Ints
    col_spans: Ints
    columns: Ints
    blocks: Ints
    strays: tuple[Stray, ...]
    dead: Ints

    @cached_property
    def plain(self) -> bool:
        """True when the mask is causal inside each segment and nothing else."""
        return self.order is None and not (len(self.row_spans) or len(self.blocks) or self.strays)

    @cached_property
    def one_span_per_row(self) -> bool:
        """True when every row is one segment from its first place on, or empty: one causal call does them all."""
        starts = self.spans[:, 0]
        return bool(np.all(starts % self.width == 0))

    @cached_property
    def area(self) -> int:
        """Attended pairs of tokens."""
        span, block = self.spans[:, 1] - self.spans[:, 0], self.blocks[:, 1] - self.blocks[:, 0]
        rectangles = (self.row_spans[:, 1] - self.row_spans[:, 0]) * (self.col_spans[:, 1] - self.col_spans[:, 0])
        strays = sum(len(stray.rows) * len(stray.columns) for stray in self.strays)
        return int((span * (span + 1) // 2).sum() + rectangles.sum() + (block * (block - 1) // 2).sum()) + strays


def lay_out(reading: TokenSegments, look: Look, pad_rows: Ints) -> MaskBlocks:
    """MaskBlocks of a look. ``pad_rows``: flat positions of PAD places that lie in a segment."""
    spans = np.stack((reading.segments.starts, reading.segments.ends), axis=1)
    place, size = reading.place, reading.rows * reading.width
    live = np.zeros(size, dtype=np.bool_)
    order: Ints | None = None
    unbroken = bool(np.all(place[spans[:, 1] - 1] - place[spans[:, 0]] == spans[:, 1] - spans[:, 0] - 1))
    if look.order is None and unbroken:
        work = place
        live[place] = True
    else:
        row = place // reading.width
        work = row * reading.width + np.arange(len(place)) - np.searchsorted(row, row)
        live[work] = True
        order = _full_order(reading, look.order, work, live)
    return MaskBlocks(
        reading.rows,
        reading.width,
        order,
        spans=_ends(work, spans),
        row_spans=_ends(work, look.row_spans),
        col_spans=look.col_spans,
        columns=work[look.columns],
        blocks=_ends(work, look.blocks),
        strays=_strays(reading, look.order, work, order, pad_rows) if len(pad_rows) else (),
        dead=np.flatnonzero(~live),
    )


def _ends(work: Ints, spans: Ints) -> Ints:
    """Spans of live tokens as spans of working places; a span never crosses a hole."""
    return np.stack((work[spans[:, 0]], work[spans[:, 1] - 1] + 1), axis=1) if len(spans) else spans


def _full_order(reading: TokenSegments, look_order: Ints | None, work: Ints, live: np.ndarray) -> Ints:
    """The flat position at each of the B * T working places: live tokens of a row first, its dead places after."""
    order = np.empty(len(live), dtype=np.int64)
    order[work] = reading.place if look_order is None else reading.place[look_order]
    dead_places = np.ones(len(live), dtype=np.bool_)
    dead_places[reading.place] = False
    # both lists ascend and each row has as many of one as of the other, so they pair up row by row
    order[~live] = np.flatnonzero(dead_places)
    return order


def _strays(
    reading: TokenSegments, look_order: Ints | None, work: Ints, order: Ints | None, pad_rows: Ints
) -> tuple[Stray, ...]:
    """PAD rows grouped by what they see: all live tokens of their segment that lie before them."""
    column_of = work.copy()
    if look_order is not None:
        column_of[look_order] = work
    row_of = np.arange(reading.rows * reading.width)
    if order is not None:
        row_of[order] = np.arange(len(order))
    spans = {
        (int(reading.place[start]) // reading.width, int(reading.segment_ids[start])): (int(start), int(end))
        for start, end in zip(reading.segments.starts, reading.segments.ends, strict=True)
    }
    seen: dict[tuple[int, int], list[int]] = {}
    for flat, segment_id in pad_rows:
        start, end = spans.get((int(flat) // reading.width, int(segment_id)), (0, 0))
        end = min(end, int(np.searchsorted(reading.place, flat)))
        if end > start:
            seen.setdefault((start, end), []).append(int(row_of[flat]))
    return tuple(Stray(np.array(rows), column_of[start:end]) for (start, end), rows in seen.items())
