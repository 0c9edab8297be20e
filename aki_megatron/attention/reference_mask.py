"""The rules as formulas over pairs of positions: the reference that every mask and kernel is compared with.

A formula says whether query q of sequence b sees key k, for index tensors that broadcast (FlexAttention's mask_mod). It
reads a few numbers per position, and knows nothing of rectangles or orders.
Letters: B sequences, T positions, M valid tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aki_megatron.attention.rules import rings, square_side, visible_text
from aki_megatron.attention.token_segments import Ints, Spans, TokenSegments, segment_tokens
from aki_megatron.config.attention import ATTENTION_RULES, AttentionConfig
from aki_megatron.types import MEDIA_MODALITIES, Modality


@dataclass(frozen=True)
class TokenFacts:
    """Per position [B, T], -1 where it does not apply.

    segment   segment id, also on PAD positions inside a segment
    valid     whether the token may be seen
    modality  Modality
    turn      number of the turn
    image     number of the image
    ring      of an image token on the square grid of its image
    visible   mma: whether media may see this token
    """

    segment: Tensor
    valid: Tensor
    modality: Tensor
    turn: Tensor
    image: Tensor
    ring: Tensor
    visible: Tensor


def _token_facts(
    modality_ids: np.ndarray, segment_ids: np.ndarray, attention: AttentionConfig, image_tokens: int
) -> TokenFacts:
    """Facts of ids int8 and int32 [B, T]. Images are split, and need a square grid, only for rules that say so."""
    tokens, rule = segment_tokens(modality_ids, segment_ids), ATTENTION_RULES[attention.rule]
    images = tokens.images(image_tokens if rule.look_ahead == "image" else 0)
    visible = np.zeros(len(tokens.positions), dtype=np.int64)
    visible[visible_text(tokens, attention)] = 1

    def per_position(values: Ints) -> Tensor:
        full = np.full(modality_ids.size, -1, dtype=np.int64)
        full[tokens.positions] = values
        return torch.from_numpy(full.reshape(modality_ids.shape))

    return TokenFacts(
        segment=torch.from_numpy(segment_ids.astype(np.int64)),
        valid=per_position(np.ones(len(tokens.positions), dtype=np.int64)) == 1,
        modality=per_position(tokens.modality.astype(np.int64)),
        turn=per_position(_numbers(tokens, tokens.turns)),
        image=per_position(_numbers(tokens, images)),
        ring=per_position(_rings(tokens, images if rule.square_images else Spans(images.starts[:0], images.ends[:0]))),
        visible=per_position(visible) == 1,
    )


def _numbers(tokens: TokenSegments, spans: Spans) -> Ints:
    numbers = np.full(len(tokens.positions), -1, dtype=np.int64)
    for number, (start, end) in enumerate(zip(spans.starts, spans.ends, strict=True)):
        numbers[start:end] = number
    return numbers


def _rings(tokens: TokenSegments, images: Spans) -> Ints:
    ring = np.full(len(tokens.positions), -1, dtype=np.int64)
    for start, end in zip(images.starts, images.ends, strict=True):
        ring[start:end] = rings(square_side(int(end - start)))
    return ring


def _mma(facts: TokenFacts, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    ahead = torch.isin(facts.modality, torch.tensor(MEDIA_MODALITIES))[b, q] & facts.visible[b, k]
    return (k <= q) | (ahead & (facts.turn[b, q] == facts.turn[b, k]))


def _mma_general(facts: TokenFacts, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    of_query, of_key = facts.modality[b, q], facts.modality[b, k]
    prompt = (of_query != Modality.RESPONSE) & (of_key != Modality.RESPONSE)
    same_turn = (facts.turn[b, q] == facts.turn[b, k]) & (facts.turn[b, q] >= 0)
    return (k <= q) | (prompt & same_turn & (of_query != of_key))


def _same_image(facts: TokenFacts, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (facts.image[b, q] == facts.image[b, k]) & (facts.image[b, q] >= 0)


def _cca(facts: TokenFacts, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    same = _same_image(facts, b, q, k)
    return (same & (facts.ring[b, k] <= facts.ring[b, q])) | (~same & (k <= q))


MASK_MODS: dict[str, Callable[[TokenFacts, Tensor, Tensor, Tensor], Tensor]] = {
    "causal": lambda facts, b, q, k: k <= q,
    "mma": _mma,
    "mma_general": _mma_general,
    "mixed": lambda facts, b, q, k: (k <= q) | _same_image(facts, b, q, k),
    "cca": _cca,
}
"""What each rule allows inside one segment, between valid tokens."""


def reference_mask(
    modality_ids: Tensor, segment_ids: Tensor, attention: AttentionConfig, image_tokens: int = 0
) -> Tensor:
    """Bool [B, T, T], True where a query sees a key, from integer ids [B, T]; leaks are not checked."""
    modality, segment = modality_ids.cpu().numpy().astype(np.int8), segment_ids.cpu().numpy().astype(np.int32)
    facts = _token_facts(modality, segment, attention, image_tokens)
    batch_size, length = modality.shape
    position = torch.arange(length)
    b, q, k = torch.arange(batch_size)[:, None, None], position[None, :, None], position[None, None, :]
    same_segment = (facts.segment[b, q] == facts.segment[b, k]) & (facts.segment[b, q] >= 0)
    return same_segment & facts.valid[b, k] & MASK_MODS[attention.rule](facts, b, q, k)
