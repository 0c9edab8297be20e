"""Where segments, turns, runs and images begin and end in a batch of ids.

Pure numpy on the host, no loop over tokens. A token is valid when its modality is not PAD and its segment id is not
NO_SEGMENT. Spans count valid tokens only, in row-major order, so padding anywhere, also inside a segment, is already
removed. Letters: B sequences, T positions, M valid tokens, S segments, U turns, R runs.
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
    """Half-open ranges [starts[n], ends[n]) of valid tokens."""

    starts: Ints
    ends: Ints

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def sizes(self) -> Ints:
        """[number of spans]"""
        return self.ends - self.starts


def split_spans(boundary: Bools, num_tokens: int) -> Spans:
    """Spans of ``num_tokens`` tokens; boundary [num_tokens - 1] is True where token i + 1 starts a new span."""
    inner = np.flatnonzero(boundary) + 1
    edges = np.empty(len(inner) + 2, dtype=np.int64)
    edges[0], edges[1:-1], edges[-1] = 0, inner, num_tokens
    return Spans(edges[:-1], edges[1:]) if num_tokens else Spans(inner, inner)


def group_and_rank(sizes: Ints) -> tuple[Ints, Ints]:
    """For groups of these sizes, concatenated: the group of every member and its rank inside the group."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    return group, np.arange(len(group)) - np.repeat(np.cumsum(sizes) - sizes, sizes)


@dataclass(frozen=True)
class TokenSegments:
    """The valid tokens of a batch.

    batch_size    B
    length        T
    positions     [M] flat position b * T + t of each valid token
    modality      [M] values of Modality
    segment_ids   [M]
    """

    batch_size: int
    length: int
    positions: Ints
    modality: NDArray[np.int8]
    segment_ids: Ints

    @cached_property
    def _new_segment(self) -> Bools:
        sequence, segment = self.positions // self.length, self.segment_ids
        return (sequence[1:] != sequence[:-1]) | (segment[1:] != segment[:-1])

    @cached_property
    def _new_turn(self) -> Bools:
        response = self.modality == Modality.RESPONSE
        return self._new_segment | (response[:-1] & ~response[1:])

    @cached_property
    def segments(self) -> Spans:
        """S segments."""
        return split_spans(self._new_segment, len(self.positions))

    @cached_property
    def turns(self) -> Spans:
        """U turns: a prompt and the response to it. A turn ends where a response is followed by something else."""
        return split_spans(self._new_turn, len(self.positions))

    @cached_property
    def runs(self) -> Spans:
        """R runs: consecutive tokens of one modality in one turn."""
        return split_spans(self._new_turn | (self.modality[1:] != self.modality[:-1]), len(self.positions))

    @cached_property
    def run_modality(self) -> NDArray[np.int8]:
        """[R]"""
        return self.modality[self.runs.starts]

    @cached_property
    def run_turn(self) -> Ints:
        """[R] index into ``turns``."""
        return np.searchsorted(self.turns.starts, self.runs.starts, side="right") - 1

    def images(self, image_tokens: int) -> Spans:
        """Images: runs of IMAGE, each split into images of ``image_tokens`` tokens; 0 takes every run for one image.

        Raises MaskError when the size of a run is not a multiple of ``image_tokens``.
        """
        chosen = np.flatnonzero(self.run_modality == Modality.IMAGE)
        starts, ends = self.runs.starts[chosen], self.runs.ends[chosen]
        if not image_tokens:
            return Spans(starts, ends)
        sizes = ends - starts
        wrong = np.flatnonzero(sizes % image_tokens)
        if len(wrong):
            sequence, position = divmod(int(self.positions[starts[wrong[0]]]), self.length)
            raise MaskError(
                f"sequence {sequence} has {int(sizes[wrong[0]])} image positions from position {position} on; with "
                f"image_tokens={image_tokens} their number must be a multiple of {image_tokens}. "
                "Give the number of latents of one image, or 0 to take each run for one image."
            )
        run, rank = group_and_rank(sizes // image_tokens)
        first = starts[run] + rank * image_tokens
        return Spans(first, first + image_tokens)


def segment_tokens(modality_ids: NDArray[np.int8], segment_ids: NDArray[np.int32]) -> TokenSegments:
    """Find the valid tokens of ids [B, T].

    Raises MaskError when a segment id comes back after another segment in the same sequence.
    """
    batch_size, length = modality_ids.shape
    modality, segment = modality_ids.reshape(-1), segment_ids.reshape(-1)
    positions = np.flatnonzero((modality != Modality.PAD) & (segment >= 0))
    tokens = TokenSegments(batch_size, length, positions, modality[positions], segment[positions].astype(np.int64))
    if len(positions):
        starts = tokens.segments.starts
        keys = (positions[starts] // length << 32) | tokens.segment_ids[starts]
        if len(starts) > batch_size and len(np.unique(keys)) < len(keys):
            _, first, count = np.unique(keys, return_index=True, return_counts=True)
            sequence, segment_id = divmod(int(keys[first[np.argmax(count > 1)]]), 1 << 32)
            raise MaskError(
                f"segment {segment_id} of sequence {sequence} is in several parts with another segment between them; "
                "the tokens of a segment must be contiguous. Give every sample of a sequence its own segment id."
            )
    return tokens
