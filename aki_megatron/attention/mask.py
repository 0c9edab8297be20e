"""AttentionMask: the mask of one micro-batch, built once on the host, immutable, used by every layer.

Letters: B sequences, T positions.
"""

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from aki_megatron.attention.leak_check import assert_no_leak
from aki_megatron.attention.mask_blocks import MaskBlocks, build_blocks
from aki_megatron.attention.positions import concentric_positions
from aki_megatron.attention.rules import BUILDERS
from aki_megatron.attention.token_segments import Ints, MaskError, TokenSegments, segment_tokens
from aki_megatron.config.attention import ATTENTION_RULES, AttentionConfig
from aki_megatron.types import Modality

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Who may attend to whom in a batch [B, T].

    A key whose modality is PAD is never seen. A query whose segment is NO_SEGMENT sees nothing, its output is 0 and no
    gradient flows through it. A PAD query inside a segment sees its causal past.
    """

    attention: AttentionConfig
    image_tokens: int
    modality_ids: np.ndarray
    segment_ids: np.ndarray
    supervised: np.ndarray
    tokens: TokenSegments
    blocks: MaskBlocks
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        modality_ids: Tensor,
        segment_ids: Tensor,
        attention: AttentionConfig,
        *,
        supervised: Tensor,
        image_tokens: int = 0,
    ) -> "AttentionMask":
        """The mask of these ids; one copy to the host if they are on a device.

        modality_ids  [B, T] integers, values of Modality
        segment_ids   [B, T] integers, which sample of the sequence; NO_SEGMENT on padding
        attention     rule and options
        supervised    [B, T] bool, positions whose next token is supervised or generated
        image_tokens  latents of one image, where a rule needs to tell adjacent images apart; 0 takes each run of IMAGE
                      positions for one image

        Raises LeakError when the rule lets a supervised position depend on a later token, MaskError when the ids
        describe no sequence.
        """
        _check(modality_ids, segment_ids, supervised, image_tokens)
        modality, segment = _on_host(modality_ids, np.int8), _on_host(segment_ids, np.int32)
        predicts = _on_host(supervised, np.bool_)
        tokens = segment_tokens(modality, segment)
        spec = BUILDERS[attention.rule](tokens, attention, image_tokens)
        assert_no_leak(spec.edges, tokens.positions, predicts, rule=attention.rule)
        padding = np.flatnonzero((modality == Modality.PAD).reshape(-1) & (segment >= 0).reshape(-1))
        pad_queries = np.stack((padding, segment.reshape(-1)[padding]), axis=1)
        blocks = build_blocks(tokens, spec, pad_queries)
        return cls(attention, image_tokens, modality, segment, predicts, tokens, blocks)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)"""
        return self.blocks.batch_size, self.blocks.length

    @cached_property
    def has_look_ahead(self) -> bool:
        """Whether some query sees a later key."""
        return bool(len(self.blocks.query_spans) or len(self.blocks.full_blocks))

    @property
    def num_pairs(self) -> int:
        """Number of (query, key) pairs; the forward pass costs 4 * num_pairs * num_heads * head_dim FLOPs."""
        return self.blocks.num_pairs

    @cached_property
    def digest(self) -> str:
        """Equal for equal rule, options and ids; what the ranks of one replica compare."""
        text = f"{self.attention!r} {self.image_tokens} {self.shape}".encode()
        state = hashlib.blake2b(text, digest_size=16)
        for ids in (self.modality_ids, self.segment_ids, self.supervised):
            state.update(ids.tobytes())
        return state.hexdigest()

    def position_ids(self, sequential: Tensor) -> Tensor:
        """Rotary position ids [B, T]: ``sequential``, the batch's own, unless the rule has others in their place."""
        if ATTENTION_RULES[self.attention.rule].position_ids == "sequential":
            return sequential
        positions = torch.from_numpy(concentric_positions(self.tokens, self.image_tokens))
        return positions.to(sequential)

    def dense(self) -> Tensor:
        """Bool [B, T, T], True where a query sees a key, from the blocks: for short sequences, figures and tests."""
        blocks, (batch_size, length) = self.blocks, self.shape
        dense = np.zeros((batch_size, length, length), dtype=np.bool_)
        for start, end in blocks.segments:
            b, first, last = start // length, start % length, start % length + end - start
            dense[b, first:last, first:last] = np.tri(last - first, dtype=np.bool_)
        for (start, end), (low, high) in zip(blocks.query_spans, blocks.key_spans, strict=True):
            b, first = start // length, start % length
            dense[b, first : first + end - start, blocks.keys[low:high] % length] = True
        for start, end in blocks.full_blocks:
            b, first, last = start // length, start % length, start % length + end - start
            dense[b, first:last, first:last] = True
        for group in blocks.padding_queries:
            dense[(group.queries // length)[:, None], (group.queries % length)[:, None], group.keys % length] = True
        if blocks.order is None:
            return torch.from_numpy(dense)
        position = (blocks.order % length).reshape(batch_size, length)
        mask = np.empty_like(dense)
        mask[np.arange(batch_size)[:, None, None], position[:, :, None], position[:, None, :]] = dense
        return torch.from_numpy(mask)

    def rows(self, sequence: int, queries: Ints) -> Tensor:
        """Bool [R, T]: which keys these queries [R] of one sequence see; the lines of ``dense`` without the others."""
        blocks, length = self.blocks, self.shape[1]
        base = sequence * length
        # kernel order moves tokens inside their sequence only
        position = np.arange(length) if blocks.order is None else blocks.order[base : base + length] - base
        index = np.empty(length, dtype=np.int64)
        index[position] = np.arange(length)
        seen = np.zeros((len(queries), length), dtype=np.bool_)
        for row, query in zip(seen, base + index[np.asarray(queries, dtype=np.int64)], strict=True):
            for start, _ in blocks.segments[_containing(blocks.segments, query)]:
                row[start - base : query + 1 - base] = True
            for low, high in blocks.key_spans[_containing(blocks.query_spans, query)]:
                row[blocks.keys[low:high] - base] = True
            for start, end in blocks.full_blocks[_containing(blocks.full_blocks, query)]:
                row[start - base : end - base] = True
            for group in blocks.padding_queries:
                if query in group.queries:
                    row[group.keys - base] = True
        return torch.from_numpy(seen[:, index])

    def cached(self, key: Hashable, build: Callable[[], Value]) -> Value:
        """What ``build`` returns, built once for each key: the plan of a kernel, built at the first layer."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]


def _containing(spans: Ints, index: int) -> np.ndarray:
    """Bool [K]: which of the spans [K, 2] hold an index."""
    return (spans[:, 0] <= index) & (index < spans[:, 1])


def _on_host(ids: Tensor, dtype: type[np.generic]) -> np.ndarray:
    return np.ascontiguousarray(ids.detach().cpu().numpy(), dtype=dtype)


def _check(modality_ids: Tensor, segment_ids: Tensor, supervised: Tensor, image_tokens: int) -> None:
    shape = tuple(modality_ids.shape)
    if len(shape) != 2 or tuple(segment_ids.shape) != shape or tuple(supervised.shape) != shape:
        raise MaskError(
            f"modality_ids {shape}, segment_ids {tuple(segment_ids.shape)} and supervised {tuple(supervised.shape)} "
            "must have one shape [sequences, positions]."
        )
    if supervised.dtype != torch.bool:
        raise MaskError(f"supervised must be bool, got {supervised.dtype}; pass targets != IGNORE.")
    if image_tokens < 0:
        raise MaskError(f"image_tokens={image_tokens} must be 0 or the number of latents of one image.")
