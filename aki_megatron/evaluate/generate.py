"""Greedy generation of a batch of prompts with a KV cache: one prefill, then one decode step per new token.

B sequences, T positions, V columns of the logits.
"""

from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from aki_megatron.attention import LayerCache
from aki_megatron.model.stage import Stage
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, StackedIds, stack_ids


def generate(
    stage: Stage,
    prompts: Batch,
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    on_logits: Callable[[Tensor], object] = lambda logits: None,
) -> list[list[int]]:
    """Continue every prompt greedily.

    prompts         one segment per sequence, right padded, of any lengths (Template.render_prompt, collated)
    stop_ids        a sequence ends before the first of these tokens
    max_new_tokens  or at this many new tokens
    on_logits       gets the logits [B, V] that each new token is chosen by

    Returns the new tokens of each sequence without the stop id. Every new token attends to all earlier tokens of its
    sequence; no prompt token attends to a new one. The result equals that of each prompt by itself and without a cache.
    """
    generated: list[list[int]] = [[] for _ in prompts.token_ids]
    unfinished = set(range(len(generated)))
    if max_new_tokens < 1:
        return generated
    state = GenerationState(stage, prompts, max_new_tokens)
    logits = state.prefill()
    for step in range(max_new_tokens):
        on_logits(logits)
        next_tokens = logits.argmax(dim=-1)
        for index, token in enumerate(next_tokens.tolist()):
            if token in stop_ids:
                unfinished.discard(index)
            if index in unfinished:
                generated[index].append(token)
        if not unfinished or step == max_new_tokens - 1:
            break
        logits = state.decode_step(next_tokens)
    return generated


class GenerationState:
    """Prompts, the tokens generated after them, and the KV cache of every layer."""

    def __init__(self, stage: Stage, prompts: Batch, max_new_tokens: int) -> None:
        """Raises ValueError where a sequence holds more than one segment or is not padded on the right."""
        if stage.input_embedder is None or stage.lm_head is None:
            raise ValueError("generation needs the whole model in one stage")
        self.stage = stage
        prompts = prompts.to(next(stage.parameters()).device)
        self.lengths = _sequence_lengths(prompts.segment_ids)
        self.max_length = prompts.token_ids.shape[1] + max_new_tokens
        # as long as the longest possible sequence, so that a new token is written in place
        self.batch = replace(
            prompts,
            token_ids=_pad_right(prompts.token_ids, max_new_tokens, 0),
            modality_ids=_pad_right(prompts.modality_ids, max_new_tokens, Modality.PAD),
            segment_ids=_pad_right(prompts.segment_ids, max_new_tokens, NO_SEGMENT),
            position_ids=_pad_right(stage.position_ids(stack_ids(prompts)), max_new_tokens, 0),
            targets=_pad_right(prompts.targets, max_new_tokens, IGNORE),
        )
        self.caches: list[LayerCache] = []

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Run all tokens so far in one pass and fill the caches; logits [B, V] of the token after each sequence."""
        config = self.stage.config.decoder
        weight = next(self.stage.layers.parameters())
        self.caches = [
            LayerCache(
                len(self.lengths),
                config.num_kv_heads,
                self.max_length,
                config.head_dim,
                dtype=weight.dtype,
                device=weight.device,
            )
            for _ in range(config.num_layers)
        ]
        longest = int(self.lengths.max())
        return self.stage.logits(
            self.batch.token_ids[:, :longest],
            stack_ids(self.batch).prefix(longest),
            self.batch.media,
            self.caches,
            positions=self.lengths - 1,
        )

    @torch.no_grad()
    def decode_step(self, tokens: Tensor) -> Tensor:
        """Append one token [B] to each sequence; logits [B, V] of the token after it."""
        batch = self.batch
        sequences = torch.arange(len(self.lengths), device=self.lengths.device)
        last, new = (sequences, self.lengths - 1), (sequences, self.lengths)
        batch.token_ids[new] = tokens
        batch.modality_ids[new] = int(Modality.RESPONSE)
        batch.segment_ids[new] = batch.segment_ids[last]
        # the largest so far plus one: under rule cca an image's last latent is not the one with its largest position
        batch.position_ids[new] = batch.position_ids.amax(dim=1) + 1
        self.lengths = self.lengths + 1
        if self._passes_longrope_threshold():
            return self.prefill()
        columns = (batch.modality_ids, batch.segment_ids, batch.position_ids, batch.targets)
        ids = StackedIds.stack(*(column[new][:, None] for column in columns))
        return self.stage.logits(tokens[:, None], ids, caches=self.caches)[:, 0]

    def _passes_longrope_threshold(self) -> bool:
        """Return whether a sequence now needs longrope's long factors: its cached keys were rotated by the short."""
        rope = self.stage.config.decoder.rope
        if rope.rope_type != "longrope" or self.max_length <= rope.original_max_position_embeddings:
            return False
        return bool((self.batch.position_ids.amax(dim=1) == rope.original_max_position_embeddings).any())


def _pad_right(values: Tensor, columns: int, value: int) -> Tensor:
    return torch.cat([values, values.new_full((len(values), columns), int(value))], dim=1)


def _sequence_lengths(segment_ids: Tensor) -> Tensor:
    """Tokens [B] of each sequence; raises ValueError unless they are one segment, followed by padding only."""
    valid = segment_ids != NO_SEGMENT
    lengths = valid.sum(dim=1)
    positions = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    packed = (valid & (segment_ids != segment_ids[:, :1])) | (valid != (positions < lengths[:, None]))
    invalid = packed.any(dim=1) | (lengths == 0)
    if bool(invalid.any()):
        raise ValueError(
            "prompts must be one segment per sequence, padded on the right; "
            f"sequence {int(invalid.nonzero()[0])} is not."
        )
    return lengths
