"""Greedy generation of a batch of prompts with a key/value cache.

B rows, T tokens, C capacity (prompt and new tokens), V columns of the logits.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from aki_megatron.attention import LayerCache
from aki_megatron.model.stage import Stage
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, stack_ids


def generate(stage: Stage, prompts: Batch, *, stop_ids: Collection[int], max_new_tokens: int) -> list[list[int]]:
    """The most probable continuation of every prompt, token by token.

    prompts         one segment per row, right padded, of any lengths (template's render_prompt, collated)
    stop_ids        a row ends before the first of these
    max_new_tokens  or when it has this many

    Returns the new tokens of each row, without the stop id. Every new token sees all earlier tokens of its row; no
    prompt token sees a new one. Equal to generating each row by itself, and to doing without the cache.
    """
    answers: list[list[int]] = [[] for _ in prompts.token_ids]
    running = set(range(len(answers)))
    if max_new_tokens < 1:
        return answers
    text = Continuation(stage, prompts, max_new_tokens)
    logits = text.start()
    for number in range(max_new_tokens):
        chosen = logits.argmax(dim=-1)
        for row, token in enumerate(chosen.tolist()):
            if token in stop_ids:
                running.discard(row)
            if row in running:
                answers[row].append(token)
        if not running or number == max_new_tokens - 1:
            break
        logits = text.extend(chosen)
    return answers


class Continuation:
    """Prompts, the tokens that were put after them, and the cache of both."""

    def __init__(self, stage: Stage, prompts: Batch, max_new_tokens: int) -> None:
        """Raises ValueError where a row holds more than one segment or its padding is not on the right."""
        if stage.front is None or stage.head is None:
            raise ValueError("generation needs the whole model in one stage")
        self.stage = stage
        device = next(stage.parameters()).device
        prompts = prompts.to(device)
        self.lengths = _lengths(prompts.segment_ids)
        self.capacity = prompts.token_ids.shape[1] + max_new_tokens
        self.rows = torch.arange(len(self.lengths), device=device)
        self.pixels = prompts.pixels
        # every place of the longest possible row, so that a new token is written, not appended
        self.token_ids = _widened(prompts.token_ids, max_new_tokens, 0)
        empty = torch.tensor([Modality.PAD, NO_SEGMENT, 0, IGNORE], dtype=torch.int32, device=device)
        self.ids = torch.cat([stack_ids(prompts), empty.expand(len(self.rows), max_new_tokens, 4)], dim=1)
        self.caches: list[LayerCache] = []

    @torch.no_grad()
    def start(self) -> Tensor:
        """Run everything so far in one pass; the logits [B, V] of each row's next token."""
        config = self.stage.config.decoder
        weight = next(self.stage.blocks.parameters())
        self.caches = [
            LayerCache(
                len(self.rows),
                config.num_kv_heads,
                self.capacity,
                config.head_dim,
                dtype=weight.dtype,
                device=weight.device,
            )
            for _ in range(config.num_layers)
        ]
        longest = int(self.lengths.max())
        return self.stage.logits(
            self.token_ids[:, :longest], self.ids[:, :longest], self.pixels, self.caches, places=self.lengths - 1
        )

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Put one token [B] after each row; the logits [B, V] of the token after it."""
        places = self.lengths
        self.token_ids[self.rows, places] = tokens
        ids = self.ids[self.rows, places - 1].clone()
        ids[:, 0] = Modality.RESPONSE
        ids[:, 2] += 1
        ids[:, 3] = IGNORE
        self.ids[self.rows, places] = ids
        self.lengths = places + 1
        if self._turns_long():
            return self.start()
        return self.stage.logits(tokens[:, None], ids[:, None], None, self.caches)[:, 0]

    def _turns_long(self) -> bool:
        """Whether a row just outgrew longrope's short factors: then its kept keys were turned by other angles."""
        rope = self.stage.config.decoder.rope
        if rope.rope_type != "longrope" or self.capacity <= rope.original_max_position_embeddings:
            return False
        return bool((self.lengths == rope.original_max_position_embeddings + 1).any())


def _widened(values: Tensor, columns: int, filler: int) -> Tensor:
    return torch.cat([values, values.new_full((len(values), columns), filler)], dim=1)


def _lengths(segment_ids: Tensor) -> Tensor:
    """Tokens [B] of each row; ValueError unless they are one segment that starts the row."""
    inside = segment_ids != NO_SEGMENT
    lengths = inside.sum(dim=1)
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    packed = (inside & (segment_ids != segment_ids[:, :1])) | (inside != (places < lengths[:, None]))
    if bool(packed.any()) or bool((lengths == 0).any()):
        raise ValueError(
            "prompts to continue must be one segment per row, padded on the right; "
            f"row {int((packed.any(dim=1) | (lengths == 0)).nonzero()[0])} is not."
        )
    return lengths
