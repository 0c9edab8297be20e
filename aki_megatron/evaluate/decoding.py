"""Decode sequences of a batch that changes: prompts join and leave between two steps, each keeps its own cache.

B sequences in the batch, T positions, V columns of the logits.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from aki_megatron.attention import LayerCache
from aki_megatron.model.stage import Stage
from aki_megatron.types import IGNORE, NO_SEGMENT, Batch, Modality, StackedIds, stack_ids


@dataclass
class _Sequence:
    """One sequence so far. ``prompt`` is a batch of this sequence alone, without padding."""

    prompt: Batch
    tokens: list[int]
    next_position: int

    def so_far(self) -> Batch:
        """Return prompt and new tokens as one batch."""
        new, prompt = len(self.tokens), self.prompt

        def extended(values: Tensor, added: list[int]) -> Tensor:
            return torch.cat([values, values.new_tensor([added])], dim=1)

        last = int(prompt.position_ids.max())
        return replace(
            prompt,
            token_ids=extended(prompt.token_ids, self.tokens),
            modality_ids=extended(prompt.modality_ids, [int(Modality.RESPONSE)] * new),
            segment_ids=extended(prompt.segment_ids, [int(prompt.segment_ids[0, -1])] * new),
            position_ids=extended(prompt.position_ids, list(range(last + 1, last + 1 + new))),
            targets=extended(prompt.targets, [IGNORE] * new),
        )


class Decoder:
    """The batch: sequences in the order in which ``admit`` got them, but where ``remove`` or ``select`` changed it.

    Every new token attends to all earlier tokens of its sequence; no prompt token attends to a new one. The logits are
    those of each sequence by itself, computed whole.
    """

    def __init__(self, stage: Stage) -> None:
        """Decode with the whole model of ``stage``; with tensor parallelism every rank decodes the same sequences.

        Raises ValueError for a stage that is a part of the model.
        """
        if stage.input_embedder is None or stage.lm_head is None:
            raise ValueError("generation needs the whole model in one stage")
        self.stage = stage
        self._linears = stage.lm_head.linears
        self._num_kv_heads = stage.config.decoder.num_kv_heads // self._linears.num_ranks
        self._device = next(stage.parameters()).device
        self._dtype = next(stage.layers.parameters()).dtype
        self._sequences: list[_Sequence] = []
        self._caches = self._new_caches(0, 0)

    def __len__(self) -> int:
        return len(self._sequences)

    @torch.no_grad()
    def admit(self, prompts: Batch) -> Tensor:
        """Add prompts to the batch; return the logits [number of prompts, V] of the token after each.

        prompts  one segment per sequence, right padded, of any lengths

        Raises ValueError where a sequence holds more than one segment or is not padded on the right.
        """
        prompts = prompts.to(self._device)
        lengths = sequence_lengths(prompts.segment_ids)
        positions = self.stage.position_ids(stack_ids(prompts))
        logits, caches = self._prefill(prompts, lengths)
        for cache, new in zip(self._caches, caches, strict=True):
            cache.insert(new)
        self._sequences += _split(replace(prompts, position_ids=positions), lengths.tolist(), self.stage)
        return logits

    @torch.no_grad()
    def step(self, tokens: list[int]) -> Tensor:
        """Append one token to each sequence; return the logits [B, V] of the token after it."""
        assert len(tokens) == len(self._sequences)
        position_ids = [sequence.next_position for sequence in self._sequences]
        for sequence, token in zip(self._sequences, tokens, strict=True):
            sequence.tokens.append(token)
            sequence.next_position += 1
        for cache in self._caches:
            cache.reserve(len(self), cache.max_length + 1)
        column = torch.tensor([tokens, position_ids], device=self._device)[:, :, None]
        segments, ignored = torch.zeros_like(column[0]), torch.full_like(column[0], IGNORE)
        ids = StackedIds.stack(torch.full_like(column[0], int(Modality.RESPONSE)), segments, column[1], ignored)
        logits = self._linears.gather_logits(self.stage.logits(column[0], ids, caches=self._caches)[:, 0])
        for number in self._outgrown(position_ids):
            logits[number] = self._recompute(number)
        return logits

    def remove(self, numbers: Collection[int]) -> None:
        """Drop sequences; the last ones of the batch take their places."""
        for number in sorted(numbers, reverse=True):
            for cache in self._caches:
                cache.remove(number)
            self._sequences[number] = self._sequences[-1]
            del self._sequences[-1]

    def select(self, numbers: list[int]) -> None:
        """Keep these sequences, in this order; one may be chosen several times: the beams of a search."""
        chosen = torch.tensor(numbers, device=self._device)
        for cache in self._caches:
            cache.select(chosen)
        self._sequences = [
            replace(self._sequences[number], tokens=list(self._sequences[number].tokens)) for number in numbers
        ]

    def _new_caches(self, batch_size: int, capacity: int) -> list[LayerCache]:
        config = self.stage.config.decoder
        return [
            LayerCache(
                batch_size, self._num_kv_heads, capacity, config.head_dim, dtype=self._dtype, device=self._device
            )
            for _ in range(config.num_layers)
        ]

    def _prefill(self, batch: Batch, lengths: Tensor) -> tuple[Tensor, list[LayerCache]]:
        longest = int(lengths.max())
        caches = self._new_caches(len(lengths), longest)
        logits = self.stage.logits(
            batch.token_ids[:, :longest],
            stack_ids(batch).prefix(longest),
            batch.media,
            caches,
            positions=lengths - 1,
        )
        return self._linears.gather_logits(logits), caches

    def _outgrown(self, position_ids: list[int]) -> list[int]:
        """Sequences whose new token is the first to need longrope's long factors: cached keys have the short ones."""
        rope = self.stage.config.decoder.rope
        if rope.rope_type != "longrope":
            return []
        limit = rope.original_max_position_embeddings
        return [number for number, position in enumerate(position_ids) if position == limit]

    def _recompute(self, number: int) -> Tensor:
        """Compute a sequence anew, its cache included; return the logits [V] of the token after it."""
        batch = self._sequences[number].so_far()
        lengths = torch.tensor([batch.token_ids.shape[1]], device=self._device)
        logits, caches = self._prefill(batch, lengths)
        for cache, new in zip(self._caches, caches, strict=True):
            cache.replace(number, new)
        return logits[0]


def _split(prompts: Batch, lengths: list[int], stage: Stage) -> list[_Sequence]:
    """Return every sequence of a batch by itself, with its media and without padding."""
    sequences = []
    latents = stage.media_tokens()
    first = {modality: 0 for modality in prompts.media}
    for number, length in enumerate(lengths):
        row = slice(number, number + 1)
        media = {}
        for modality, items in prompts.media.items():
            count = int((prompts.modality_ids[number] == modality).sum()) // latents[modality]
            media[modality] = items[first[modality] : first[modality] + count]
            first[modality] += count
        columns = ("token_ids", "modality_ids", "segment_ids", "position_ids", "targets")
        alone = replace(prompts, media=media, **{name: getattr(prompts, name)[row, :length] for name in columns})
        sequences.append(_Sequence(alone, [], int(alone.position_ids.max()) + 1))
    return sequences


def sequence_lengths(segment_ids: Tensor) -> Tensor:
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
