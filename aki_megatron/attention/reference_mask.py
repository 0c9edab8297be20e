"""The rules as formulas over pairs of tokens: the dense oracle, and the mask function of FlexAttention.

Each formula says whether row q of batch row b sees column k, for index tensors that broadcast. It uses nothing but a
few numbers per token, and knows nothing of rectangles or orders. Letters: B rows, T tokens, M live tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from aki_megatron.attention.rules import RuleOptions, question_columns, rings, square_side
from aki_megatron.attention.token_segments import Ints, Spans, TokenSegments, segment_tokens
from aki_megatron.types import Modality


@dataclass(frozen=True)
class TokenFacts:
    """Per token [B, T], -1 where it does not apply.

    segment   segment id, also on PAD rows inside a segment
    live      whether the token may be seen
    modality  Modality
    turn      number of the turn
    image     number of the image
    ring      of an image token on the square grid of its image
    visible   mma: whether images may see this token
    """

    segment: Tensor
    live: Tensor
    modality: Tensor
    turn: Tensor
    image: Tensor
    ring: Tensor
    visible: Tensor

    def to(self, device: torch.device) -> "TokenFacts":
        """The same facts on ``device``."""
        return TokenFacts(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def token_facts(modality_ids: np.ndarray, segment_ids: np.ndarray, rule: str, options: RuleOptions) -> TokenFacts:
    """Facts of ids int8 and int32 [B, T]; the ring is given for rule cca only, which alone needs square images."""
    reading = segment_tokens(modality_ids, segment_ids)
    images = reading.images(options.image_tokens) if rule in ("mixed", "cca") else reading.images(0)
    visible = np.zeros(len(reading.place), dtype=np.int64)
    visible[question_columns(reading, options)] = 1

    def spread_out(values: Ints) -> Tensor:
        full = np.full(modality_ids.size, -1, dtype=np.int64)
        full[reading.place] = values
        return torch.from_numpy(full.reshape(modality_ids.shape))

    return TokenFacts(
        segment=torch.from_numpy(segment_ids.astype(np.int64)),
        live=spread_out(np.ones(len(reading.place), dtype=np.int64)) == 1,
        modality=spread_out(reading.modality.astype(np.int64)),
        turn=spread_out(_numbers(reading, reading.turns)),
        image=spread_out(_numbers(reading, images)),
        ring=spread_out(_ring_of(reading, images if rule == "cca" else Spans(images.starts[:0], images.ends[:0]))),
        visible=spread_out(visible) == 1,
    )


def _numbers(reading: TokenSegments, spans: Spans) -> Ints:
    numbers = np.full(len(reading.place), -1, dtype=np.int64)
    for number, (start, end) in enumerate(zip(spans.starts, spans.ends, strict=True)):
        numbers[start:end] = number
    return numbers


def _ring_of(reading: TokenSegments, images: Spans) -> Ints:
    ring = np.full(len(reading.place), -1, dtype=np.int64)
    for start, end in zip(images.starts, images.ends, strict=True):
        ring[start:end] = rings(square_side(int(end - start)))
    return ring


def _mma(facts: TokenFacts, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    looks = (facts.modality[b, q] == Modality.IMAGE) & facts.visible[b, k]
    return (k <= q) | (looks & (facts.turn[b, q] == facts.turn[b, k]))


def _general(facts: TokenFacts, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    mine, theirs = facts.modality[b, q], facts.modality[b, k]
    prompt = (mine != Modality.RESPONSE) & (theirs != Modality.RESPONSE)
    same_turn = (facts.turn[b, q] == facts.turn[b, k]) & (facts.turn[b, q] >= 0)
    return (k <= q) | (prompt & same_turn & (mine != theirs))


def _same_image(facts: TokenFacts, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (facts.image[b, q] == facts.image[b, k]) & (facts.image[b, q] >= 0)


def _cca(facts: TokenFacts, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    same = _same_image(facts, b, q, k)
    return (same & (facts.ring[b, k] <= facts.ring[b, q])) | (~same & (k <= q))


FORMULAS: dict[str, Callable[[TokenFacts, Tensor, Tensor, Tensor], Tensor]] = {
    "causal": lambda facts, b, q, k: k <= q,
    "mma": _mma,
    "mma_general": _general,
    "mixed": lambda facts, b, q, k: (k <= q) | _same_image(facts, b, q, k),
    "cca": _cca,
}
"""What each rule allows inside one segment, between live columns."""


def sees(facts: TokenFacts, rule: str, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Whether row q sees column k in batch row b; b, q, k broadcast."""
    same_segment = (facts.segment[b, q] == facts.segment[b, k]) & (facts.segment[b, q] >= 0)
    return same_segment & facts.live[b, k] & FORMULAS[rule](facts, b, q, k)


def dense_mask(modality_ids: Tensor, segment_ids: Tensor, rule: str, options: RuleOptions) -> Tensor:
    """Bool [B, T, T], True where a row sees a column; any mask a rule can describe, leaking or not."""
    modality, segment = modality_ids.cpu().numpy().astype(np.int8), segment_ids.cpu().numpy().astype(np.int32)
    facts = token_facts(modality, segment, rule, options)
    rows, width = modality.shape
    token = torch.arange(width)
    return sees(facts, rule, torch.arange(rows)[:, None, None], token[None, :, None], token[None, None, :])
