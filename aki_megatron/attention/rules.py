"""The rules: who sees whom, as pure functions of the ids.

A rule is said three times, so that each saying checks the others: here as ``look`` (which tokens a query sees beyond
its causal past, as few rectangles and triangles: what the kernels run), in oracle.py as one formula over pairs of
tokens (the dense mask), and in the tests as three nested loops.

causal       j <= i.
mma          paper eq. 5 per turn: image rows also see the later prompt text of their turn, assistant marker included.
             image to image stays causal, responses stay causal and unseen.
mma_general  paper eq. 6 inside the prompt of one turn: tokens of different modality see each other both ways.
mixed        image rows see the whole of their own image; all else causal.
cca          concentric causal attention (cca-llava): inside an image, row-major on a square grid, a token sees the
             rings that are not further in than its own, both ways; all else causal. Ring 0 is the border.

Positions here are those of reading.py: live tokens only. Letters: M live tokens, K stretches, E edges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import numpy as np

from aki_megatron.attention.token_segments import Ints, MaskError, Spans, TokenSegments, cut, spread
from aki_megatron.types import Modality

Selection = Literal["prefix", "suffix", "random"]
NONE = np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class RuleOptions:
    """What a rule needs besides the ids.

    visible_fraction  mma: share of the question columns of a turn that its images see, 0 to 1; nested subsets
    selection         mma: which ones: the first, the last, or a seeded random subset
    seed              of the random subset; the same turn of a sample gets the same subset wherever it is packed
    image_tokens      mixed, cca: latents of one image; 0 takes each run of IMAGE places for one image
    """

    visible_fraction: float = 1.0
    selection: Selection = "prefix"
    seed: int = 0
    image_tokens: int = 0


@dataclass(frozen=True)
class Look:
    """What a rule adds to the causal mask of each segment, after its tokens were put into ``order``.

    order      [M] or None: the token at each place of the new order; moves tokens inside their segment only
    row_spans  [K, 2] places of the new order whose rows see ...
    col_spans  [K, 2] ... these entries of ``columns``, all later than the rows
    columns    places of the new order
    blocks     [K, 2] stretches of the new order whose tokens all see each other
    edges      [E, 2] row and column, in the old order, of look-ahead edges i -> j such that the intervals [i, j)
               cover those of every look-ahead edge: what the leak certificate checks
    """

    row_spans: Ints
    col_spans: Ints
    columns: Ints
    blocks: Ints
    edges: Ints
    order: Ints | None = None


NO_LOOK_AHEAD = Look(NONE, NONE, np.zeros(0, dtype=np.int64), NONE, NONE)


def pairs(first: Ints, second: Ints) -> Ints:
    """[K, 2] from two [K]."""
    return np.stack((first, second), axis=1)


def question_columns(reading: TokenSegments, options: RuleOptions) -> Ints:
    """Live tokens that images may see under ``mma``, ascending: prompt text, thinned by ``visible_fraction``."""
    text = np.flatnonzero(reading.modality == Modality.TEXT)
    if options.visible_fraction >= 1.0:
        return text
    image_runs = np.flatnonzero(reading.run_modality == Modality.IMAGE)
    turns, first = np.unique(reading.run_turn[image_runs], return_index=True)
    # the question of a turn is its text after its first image; text before it is seen causally anyway
    low = np.searchsorted(text, reading.runs.ends[image_runs[first]])
    size = np.searchsorted(text, reading.turns.ends[turns]) - low
    group, rank = spread(size)
    kept = np.floor(options.visible_fraction * size + 0.5).astype(np.int64)[group]
    if options.selection == "random":
        opening = np.searchsorted(reading.segments.starts, reading.turns.starts[turns], side="right") - 1
        ordinal = turns - np.searchsorted(reading.turns.starts, reading.segments.starts[opening])
        draw = scramble(options.seed, ordinal[group], rank)
        rank = rank.copy()
        rank[np.lexsort((draw, group))] = spread(size)[1]
    chosen = rank >= size[group] - kept if options.selection == "suffix" else rank < kept
    return text[(low[group] + spread(size)[1])[chosen]]


def scramble(seed: int, turn: Ints, rank: Ints) -> Ints:
    """A fixed pseudo-random number for each (seed, turn, rank): splitmix64, the same on every machine."""
    with np.errstate(over="ignore"):
        x = (np.uint64(seed) << np.uint64(40)) ^ (turn.astype(np.uint64) << np.uint64(20)) ^ rank.astype(np.uint64)
        x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x ^ (x >> np.uint64(31))).view(np.int64)


def rings(side: int) -> Ints:
    """[side * side] ring of every cell of a square grid, row-major; 0 is the border (cca-llava)."""
    line = np.minimum(np.arange(side), np.arange(side)[::-1])
    return np.minimum(line[:, None], line[None, :]).reshape(-1)


def square_side(image_tokens: int) -> int:
    """Side of the grid of one image; raises MaskError when the number of its latents is no square."""
    side = isqrt(image_tokens)
    if side * side != image_tokens:
        raise MaskError(
            f"rule cca needs a square grid of latents, got an image of {image_tokens} places; "
            f"use {side * side} or {(side + 1) ** 2}, or set image_tokens when images are next to each other."
        )
    return side


def build_causal(reading: TokenSegments, options: RuleOptions) -> Look:
    """Nothing beyond the causal past."""
    return NO_LOOK_AHEAD


def build_mma(reading: TokenSegments, options: RuleOptions) -> Look:
    """One rectangle for each run of image tokens: its rows, and the visible text after it in its turn."""
    image_runs = np.flatnonzero(reading.run_modality == Modality.IMAGE)
    if not len(image_runs) or options.visible_fraction == 0.0:
        return NO_LOOK_AHEAD
    text = question_columns(reading, options)
    starts, ends = reading.runs.starts[image_runs], reading.runs.ends[image_runs]
    low = np.searchsorted(text, ends)
    high = np.searchsorted(text, reading.turns.ends[reading.run_turn[image_runs]])
    seen = high > low
    starts, ends, low, high = starts[seen], ends[seen], low[seen], high[seen]
    return Look(pairs(starts, ends), pairs(low, high), text, NONE, pairs(starts, text[high - 1]))


def build_mma_general(reading: TokenSegments, options: RuleOptions) -> Look:
    """Sort each prompt by modality, images first: then all is causal but for the later groups of the prompt."""
    turn = np.repeat(np.arange(len(reading.turns)), reading.turns.ends - reading.turns.starts)
    # IMAGE before all others, because its rows are long and its columns few; RESPONSE after the whole prompt
    response = reading.modality == Modality.RESPONSE
    rank = np.where(reading.modality == Modality.IMAGE, 0, reading.modality.astype(np.int64)) + 512 * response
    key = turn * 1024 + rank
    order = np.argsort(key, kind="stable")
    key = key[order]
    groups = cut(key[1:] != key[:-1], len(key))
    prompt = np.flatnonzero(key[groups.starts] % 1024 < 512)
    starts, ends, owner = groups.starts[prompt], groups.ends[prompt], key[groups.starts[prompt]] // 1024
    followed = np.flatnonzero(owner[:-1] == owner[1:])
    if not len(followed):
        return NO_LOOK_AHEAD
    prompt_end = ends[np.searchsorted(owner, owner[followed], side="right") - 1]
    rows, cols = pairs(starts[followed], ends[followed]), pairs(ends[followed], prompt_end)
    edges = general_edges(reading, np.unique(owner[followed]))
    still = bool(np.all(order[1:] > order[:-1]))
    return Look(rows, cols, np.arange(len(order)), NONE, edges, None if still else order)


def general_edges(reading: TokenSegments, turns: Ints) -> Ints:
    """The widest look-ahead edges of prompts with several modalities.

    From the first token to the last of another modality, and from the first of another modality to the last token:
    together they cover the prompt, because runs next to each other differ in modality.
    """
    runs, of_turn = reading.runs, reading.run_turn
    first, last = np.searchsorted(of_turn, turns), np.searchsorted(of_turn, turns, side="right") - 1
    last = last - (reading.run_modality[last] == Modality.RESPONSE)
    same = (reading.run_modality[first] == reading.run_modality[last]).astype(np.int64)
    ahead = pairs(runs.starts[first], runs.ends[last - same] - 1)
    back = pairs(runs.starts[first + same], runs.ends[last] - 1)
    return np.concatenate((ahead, back[same == 1]))


def build_mixed(reading: TokenSegments, options: RuleOptions) -> Look:
    """One block for each image."""
    images = reading.images(options.image_tokens)
    starts, ends = _long(images)
    blocks = pairs(starts, ends)
    return Look(NONE, NONE, NO_LOOK_AHEAD.columns, blocks, pairs(starts, ends - 1)) if len(blocks) else NO_LOOK_AHEAD


def build_cca(reading: TokenSegments, options: RuleOptions) -> Look:
    """Sort each image from the border inwards: then all is causal but for one block for each ring."""
    images = reading.images(options.image_tokens)
    starts, ends = _long(images)
    if not len(starts):
        return NO_LOOK_AHEAD
    order, blocks = np.arange(len(reading.place)), []
    for size in np.unique(ends - starts):
        ring = rings(square_side(int(size)))
        first = starts[ends - starts == size][:, None]
        order[first + np.arange(size)] = first + np.argsort(ring, kind="stable")
        inner = np.concatenate(([0], np.cumsum(np.bincount(ring))))
        blocks.append(pairs((first + inner[:-1]).reshape(-1), (first + inner[1:]).reshape(-1)))
    joined = np.concatenate(blocks)
    joined = joined[joined[:, 1] - joined[:, 0] > 1]
    still = bool(np.all(order[1:] > order[:-1]))
    return Look(NONE, NONE, NO_LOOK_AHEAD.columns, joined, pairs(starts, ends - 1), None if still else order)


def _long(images: Spans) -> tuple[Ints, Ints]:
    """Starts and ends of the images of more than one place."""
    several = images.ends - images.starts > 1
    return images.starts[several], images.ends[several]


RULES: dict[str, Callable[[TokenSegments, RuleOptions], Look]] = {
    "causal": build_causal,
    "mma": build_mma,
    "mma_general": build_mma_general,
    "mixed": build_mixed,
    "cca": build_cca,
}
"""Every rule by the name a configuration uses."""
