"""TokenSegments the ids: which tokens live, and where segments, turns, runs and images begin and end.

Pure numpy on the host, no loop over tokens. Letters: B rows, T tokens, M live tokens, S segments, U turns, R runs.
A token lives when its modality is not PAD and its segment id is not NO_SEGMENT. All positions below count live tokens
only, in row-major order, so that padding anywhere, also inside a segment, is already out of the way.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from aki_megatron.errors import UserError
from aki_megatron.types import Modality

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class MaskError(UserError):
    """Ids that describe no sequence: a segment in two parts, an image of the wrong size, shapes that differ."""


@dataclass(frozen=True)
class Spans:
    """Half-open stretches [starts[n], ends[n]) of live tokens."""

    starts: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.starts)


def cut(boundary: Bools, tokens: int) -> Spans:
    """Spans of M tokens from the [M - 1] places where token i + 1 begins something new."""
    inner = np.flatnonzero(boundary) + 1
    edges = np.empty(len(inner) + 2, dtype=np.int64)
    edges[0], edges[1:-1], edges[-1] = 0, inner, tokens
    return Spans(edges[:-1], edges[1:]) if tokens else Spans(inner, inner)


def spread(counts: Ints) -> tuple[Ints, Ints]:
    """For groups of the given sizes laid end to end: group number and rank inside the group of every member."""
    group = np.repeat(np.arange(len(counts)), counts)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(counts) - counts, counts)


@dataclass(frozen=True)
class TokenSegments:
    """The live tokens of one rectangle of ids.

    place     [M] flat position b * T + t of each live token
    modality  [M]
    """

    rows: int
    width: int
    place: Ints
    modality: NDArray[np.int8]
    segment_ids: Ints

    @cached_property
    def _new_segment(self) -> Bools:
        row, segment = self.place // self.width, self.segment_ids
        return (row[1:] != row[:-1]) | (segment[1:] != segment[:-1])

    @cached_property
    def _new_turn(self) -> Bools:
        response = self.modality == Modality.RESPONSE
        return self._new_segment | (response[:-1] & ~response[1:])

    @cached_property
    def segments(self) -> Spans:
        """S segments."""
        return cut(self._new_segment, len(self.place))

    @cached_property
    def turns(self) -> Spans:
        """U turns: a prompt and the response to it. A turn ends where a response is followed by something else."""
        return cut(self._new_turn, len(self.place))

    @cached_property
    def runs(self) -> Spans:
        """R runs: neighbours of one modality in one turn."""
        return cut(self._new_turn | (self.modality[1:] != self.modality[:-1]), len(self.place))

    @cached_property
    def run_modality(self) -> NDArray[np.int8]:
        """[R]"""
        return self.modality[self.runs.starts]

    @cached_property
    def run_turn(self) -> Ints:
        """[R] index into ``turns``."""
        return np.searchsorted(self.turns.starts, self.runs.starts, side="right") - 1

    def images(self, image_tokens: int) -> Spans:
        """Images: runs of IMAGE, each cut into pieces of ``image_tokens``; 0 takes every run for one image.

        Raises MaskError when a run is no multiple of ``image_tokens``.
        """
        chosen = np.flatnonzero(self.run_modality == Modality.IMAGE)
        starts, ends = self.runs.starts[chosen], self.runs.ends[chosen]
        if not image_tokens:
            return Spans(starts, ends)
        sizes = ends - starts
        wrong = np.flatnonzero(sizes % image_tokens)
        if len(wrong):
            row, column = divmod(int(self.place[starts[wrong[0]]]), self.width)
            raise MaskError(
                f"row {row} has {int(sizes[wrong[0]])} image places from column {column} on; with "
                f"image_tokens={image_tokens} their number must be a multiple of {image_tokens}. "
                "Give the number of latents of one image, or 0 to take each run for one image."
            )
        run, rank = spread(sizes // image_tokens)
        first = starts[run] + rank * image_tokens
        return Spans(first, first + image_tokens)


def segment_tokens(modality_ids: NDArray[np.int8], segment_ids: NDArray[np.int32]) -> TokenSegments:
    """Read ids [B, T]; raises MaskError when a segment id comes back after another segment in the same row."""
    rows, width = modality_ids.shape
    modality, segment = modality_ids.reshape(-1), segment_ids.reshape(-1)
    place = np.flatnonzero((modality != Modality.PAD) & (segment >= 0))
    reading = TokenSegments(rows, width, place, modality[place], segment[place].astype(np.int64))
    if len(place):
        starts = reading.segments.starts
        names = (place[starts] // width << 32) | reading.segment_ids[starts]
        if len(starts) > rows and len(np.unique(names)) < len(names):
            _, first, count = np.unique(names, return_index=True, return_counts=True)
            row, segment_id = divmod(int(names[first[np.argmax(count > 1)]]), 1 << 32)
            raise MaskError(
                f"segment {segment_id} of row {row} is in several parts with another segment between them; "
                "the tokens of a segment must be neighbours. Give every sample of a row its own segment id."
            )
    return reading
