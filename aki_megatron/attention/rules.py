"""The attention rules: one mask builder for each, as a pure function of the ids.

Each rule has three independent implementations that are tested against each other: the builder here (which keys a
query sees beyond its causal past, as few rectangles and blocks: what the kernels run), the formula over pairs of
positions in reference_mask.py (the dense mask), and three nested loops in the tests. What else the project needs to
know of a rule is in the registry (config/attention.py).

causal       j <= i.
mma          MMA paper, eq. 5, per turn: positions of media (images, audio) also see the later prompt text of their
             turn, assistant marker included. Media to media stays causal; responses stay causal and are not seen from
             before.
mma_general  MMA paper, eq. 6, inside the prompt of one turn: tokens of different modality see each other both ways.
mixed        Image positions see their whole image; everything else is causal.
cca          Concentric causal attention (cca-llava): inside an image, row-major on a square grid, a token sees the
             rings that are not further in than its own, both ways; everything else is causal. Ring 0 is the border.

Indices are those of token_segments.py: valid tokens only. Letters: M valid tokens, K spans, E edges.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import numpy as np

from aki_megatron.attention.token_segments import (
    Ints,
    MaskError,
    Spans,
    TokenSegments,
    group_and_rank,
    split_spans,
)
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.hashing import GOLDEN_GAMMA, splitmix64
from aki_megatron.types import MEDIA_MODALITIES, Modality

NO_SPANS = np.zeros((0, 2), dtype=np.int64)


@dataclass(frozen=True)
class MaskSpec:
    """What a rule adds to the causal mask of each segment, after its tokens were permuted by ``order``.

    order        [M] or None: the token at each position of the new order; moves tokens inside their segment only
    query_spans  [K, 2] positions of the new order whose queries see ...
    key_spans    [K, 2] ... these entries of ``keys``, all later than the queries
    keys         positions of the new order
    full_blocks  [K, 2] spans of the new order whose tokens all see each other
    edges        [E, 2] query and key, in the old order, of look-ahead edges i -> j such that the intervals [i, j)
                 cover those of every look-ahead edge: what the leak check reads
    """

    query_spans: Ints
    key_spans: Ints
    keys: Ints
    full_blocks: Ints
    edges: Ints
    order: Ints | None = None


NO_LOOK_AHEAD = MaskSpec(NO_SPANS, NO_SPANS, np.zeros(0, dtype=np.int64), NO_SPANS, NO_SPANS)


def pairs(first: Ints, second: Ints) -> Ints:
    """[K, 2] from two [K]."""
    return np.stack((first, second), axis=1)


def visible_text(tokens: TokenSegments, attention: AttentionConfig) -> Ints:
    """Valid tokens that media may see under ``mma``, ascending: prompt text, thinned by ``visible_fraction``."""
    text = np.flatnonzero(tokens.modality == Modality.TEXT)
    if attention.visible_fraction >= 1.0:
        return text
    media_runs = np.flatnonzero(np.isin(tokens.run_modality, MEDIA_MODALITIES))
    turns, first = np.unique(tokens.run_turn[media_runs], return_index=True)
    # only text after the first media item of a turn counts; text before it is seen causally anyway
    low = np.searchsorted(text, tokens.runs.ends[media_runs[first]])
    size = np.searchsorted(text, tokens.turns.ends[turns]) - low
    group, rank = group_and_rank(size)
    kept = np.floor(attention.visible_fraction * size + 0.5).astype(np.int64)[group]
    if attention.selection == "random":
        # the turn is numbered inside its segment, so that a sample gets the same subset wherever it is packed
        segment = np.searchsorted(tokens.segments.starts, tokens.turns.starts[turns], side="right") - 1
        turn_number = turns - np.searchsorted(tokens.turns.starts, tokens.segments.starts[segment])
        priority = hash64(attention.seed, turn_number[group], rank)
        rank = rank.copy()
        rank[np.lexsort((priority, group))] = group_and_rank(size)[1]
    chosen = rank >= size[group] - kept if attention.selection == "suffix" else rank < kept
    return text[(low[group] + group_and_rank(size)[1])[chosen]]


def hash64(seed: int, turn: Ints, rank: Ints) -> Ints:
    """A fixed pseudo-random number for each (seed, turn, rank), the same on every machine."""
    counter = (np.uint64(seed) << np.uint64(40)) ^ (turn.astype(np.uint64) << np.uint64(20)) ^ rank.astype(np.uint64)
    # output number ``counter`` of the splitmix64 generator seeded with 0
    return splitmix64(counter * np.uint64(GOLDEN_GAMMA)).view(np.int64)


def rings(side: int) -> Ints:
    """[side * side] ring of every cell of a square grid, row-major; 0 is the border (cca-llava)."""
    line = np.minimum(np.arange(side), np.arange(side)[::-1])
    return np.minimum(line[:, None], line[None, :]).reshape(-1)


def square_side(image_tokens: int) -> int:
    """Side of the grid of one image. Raises MaskError when the number of its latents is not a square."""
    side = isqrt(image_tokens)
    if side * side != image_tokens:
        raise MaskError(
            f"rule cca needs a square grid of latents, got an image of {image_tokens} positions; "
            f"use {side * side} or {(side + 1) ** 2}, or set image_tokens when images are next to each other."
        )
    return side


def build_causal(tokens: TokenSegments, attention: AttentionConfig, image_tokens: int) -> MaskSpec:
    """Nothing beyond the causal past."""
    return NO_LOOK_AHEAD


def build_mma(tokens: TokenSegments, attention: AttentionConfig, image_tokens: int) -> MaskSpec:
    """One rectangle for each run of media tokens: its queries, and the visible text after it in its turn as keys."""
    media_runs = np.flatnonzero(np.isin(tokens.run_modality, MEDIA_MODALITIES))
    if not len(media_runs) or attention.visible_fraction == 0.0:
        return NO_LOOK_AHEAD
    text = visible_text(tokens, attention)
    starts, ends = tokens.runs.starts[media_runs], tokens.runs.ends[media_runs]
    low = np.searchsorted(text, ends)
    high = np.searchsorted(text, tokens.turns.ends[tokens.run_turn[media_runs]])
    seen = high > low
    starts, ends, low, high = starts[seen], ends[seen], low[seen], high[seen]
    return MaskSpec(pairs(starts, ends), pairs(low, high), text, NO_SPANS, pairs(starts, text[high - 1]))


def build_mma_general(tokens: TokenSegments, attention: AttentionConfig, image_tokens: int) -> MaskSpec:
    """Sort each prompt by modality, images first: then all is causal but for the later groups of the prompt."""
    turn = np.repeat(np.arange(len(tokens.turns)), tokens.turns.sizes)
    # IMAGE first, because it has many queries and few keys; RESPONSE after the whole prompt
    response = tokens.modality == Modality.RESPONSE
    rank = np.where(tokens.modality == Modality.IMAGE, 0, tokens.modality.astype(np.int64)) + 512 * response
    key = turn * 1024 + rank
    order = np.argsort(key, kind="stable")
    key = key[order]
    groups = split_spans(key[1:] != key[:-1], len(key))
    prompt = np.flatnonzero(key[groups.starts] % 1024 < 512)
    starts, ends, owner = groups.starts[prompt], groups.ends[prompt], key[groups.starts[prompt]] // 1024
    followed = np.flatnonzero(owner[:-1] == owner[1:])
    if not len(followed):
        return NO_LOOK_AHEAD
    prompt_end = ends[np.searchsorted(owner, owner[followed], side="right") - 1]
    query_spans, key_spans = pairs(starts[followed], ends[followed]), pairs(ends[followed], prompt_end)
    edges = _general_edges(tokens, np.unique(owner[followed]))
    return MaskSpec(query_spans, key_spans, np.arange(len(order)), NO_SPANS, edges, _unless_sorted(order))


def _general_edges(tokens: TokenSegments, turns: Ints) -> Ints:
    """The widest look-ahead edges of prompts with several modalities.

    From the first token to the last of another modality, and from the first of another modality to the last token:
    together they cover the prompt, because adjacent runs differ in modality.
    """
    runs, run_turn = tokens.runs, tokens.run_turn
    first, last = np.searchsorted(run_turn, turns), np.searchsorted(run_turn, turns, side="right") - 1
    last = last - (tokens.run_modality[last] == Modality.RESPONSE)
    same = (tokens.run_modality[first] == tokens.run_modality[last]).astype(np.int64)
    ahead = pairs(runs.starts[first], runs.ends[last - same] - 1)
    back = pairs(runs.starts[first + same], runs.ends[last] - 1)
    return np.concatenate((ahead, back[same == 1]))


def build_mixed(tokens: TokenSegments, attention: AttentionConfig, image_tokens: int) -> MaskSpec:
    """One full block for each image."""
    starts, ends = _several_tokens(tokens.images(image_tokens))
    blocks = pairs(starts, ends)
    if not len(blocks):
        return NO_LOOK_AHEAD
    return MaskSpec(NO_SPANS, NO_SPANS, NO_LOOK_AHEAD.keys, blocks, pairs(starts, ends - 1))


def build_cca(tokens: TokenSegments, attention: AttentionConfig, image_tokens: int) -> MaskSpec:
    """Sort each image from the border inwards: then all is causal but for one full block for each ring."""
    starts, ends = _several_tokens(tokens.images(image_tokens))
    if not len(starts):
        return NO_LOOK_AHEAD
    order, blocks = np.arange(len(tokens.positions)), []
    for size in np.unique(ends - starts):
        ring = rings(square_side(int(size)))
        first = starts[ends - starts == size][:, None]
        order[first + np.arange(size)] = first + np.argsort(ring, kind="stable")
        inner = np.concatenate(([0], np.cumsum(np.bincount(ring))))
        blocks.append(pairs((first + inner[:-1]).reshape(-1), (first + inner[1:]).reshape(-1)))
    joined = np.concatenate(blocks)
    joined = joined[joined[:, 1] - joined[:, 0] > 1]
    return MaskSpec(NO_SPANS, NO_SPANS, NO_LOOK_AHEAD.keys, joined, pairs(starts, ends - 1), _unless_sorted(order))


def _several_tokens(images: Spans) -> tuple[Ints, Ints]:
    """Starts and ends of the images of more than one token."""
    several = images.sizes > 1
    return images.starts[several], images.ends[several]


def _unless_sorted(order: Ints) -> Ints | None:
    return None if bool(np.all(order[1:] > order[:-1])) else order


BUILDERS: dict[str, Callable[[TokenSegments, AttentionConfig, int], MaskSpec]] = {
    "causal": build_causal,
    "mma": build_mma,
    "mma_general": build_mma_general,
    "mixed": build_mixed,
    "cca": build_cca,
}
"""Rule -> mask of (tokens, attention, image_tokens); image_tokens is the size of an image, 0 takes each run for one."""
