"""AttentionMask: one mask, built once for a micro-batch on the host, immutable, used by every layer.

Letters: B rows, T tokens.
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
from aki_megatron.attention.mask_blocks import MaskBlocks, lay_out
from aki_megatron.attention.rules import RULES, RuleOptions, Selection
from aki_megatron.attention.token_segments import MaskError, segment_tokens
from aki_megatron.types import Modality

Made = TypeVar("Made")


def _host(ids: Tensor, dtype: type[np.generic]) -> np.ndarray:
    return np.ascontiguousarray(ids.detach().cpu().numpy(), dtype=dtype)


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Who may attend to whom in a batch [B, T].

    A key whose modality is PAD is never seen. A row whose segment is NO_SEGMENT sees nothing, its output is 0 and no
    gradient goes through it. A PAD row inside a segment sees its causal past.
    """

    rule: str
    options: RuleOptions
    modality_ids: np.ndarray
    segment_ids: np.ndarray
    scored: np.ndarray
    pieces: MaskBlocks
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        modality_ids: Tensor,
        segment_ids: Tensor,
        *,
        rule: str,
        scored: Tensor,
        visible_fraction: float = 1.0,
        selection: Selection = "prefix",
        seed: int = 0,
        image_tokens: int = 0,
    ) -> "AttentionMask":
        """The layout of ids; one copy to the host if they are on a device.

        modality_ids      [B, T] integers, values of Modality
        segment_ids       [B, T] integers, which sample of the row; NO_SEGMENT on padding
        rule              a name of rules.RULES
        scored            [B, T] bool, rows whose next token is learnt or generated
        visible_fraction, selection, seed, image_tokens: see RuleOptions

        Raises LeakError when the rule lets a scored row depend on a later token, MaskError when the arguments
        describe no sequence or no rule.
        """
        options = RuleOptions(visible_fraction, selection, seed, image_tokens)
        _check(modality_ids, segment_ids, scored, rule, options)
        modality, segment = _host(modality_ids, np.int8), _host(segment_ids, np.int32)
        marks = _host(scored, np.bool_)
        reading = segment_tokens(modality, segment)
        look = RULES[rule](reading, options)
        assert_no_leak(look.edges, reading.place, marks, rule=rule)
        padding = np.flatnonzero((modality == Modality.PAD).reshape(-1) & (segment >= 0).reshape(-1))
        pad_rows = np.stack((padding, segment.reshape(-1)[padding]), axis=1)
        return cls(rule, options, modality, segment, marks, lay_out(reading, look, pad_rows))

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)"""
        return self.pieces.rows, self.pieces.width

    @cached_property
    def has_look_ahead(self) -> bool:
        """Whether some row sees a later column."""
        return bool(len(self.pieces.row_spans) or len(self.pieces.blocks))

    @property
    def area(self) -> int:
        """Attended pairs of tokens; the forward pass costs 4 * area * heads * head width operations."""
        return self.pieces.area

    @cached_property
    def digest(self) -> str:
        """Equal for equal rule, options and ids; what the ranks of one replica compare."""
        text = f"{self.rule} {self.options} {self.shape}".encode()
        state = hashlib.blake2b(text, digest_size=16)
        for ids in (self.modality_ids, self.segment_ids, self.scored):
            state.update(ids.tobytes())
        return state.hexdigest()

    def dense(self) -> Tensor:
        """Bool [B, T, T], True where a row sees a column: for tests, pictures and the dense backend."""
        pieces, (rows, width) = self.pieces, self.shape
        working = np.zeros((rows, width, width), dtype=np.bool_)
        for start, end in pieces.spans:
            row, first, last = start // width, start % width, start % width + end - start
            working[row, first:last, first:last] = np.tri(last - first, dtype=np.bool_)
        for (start, end), (low, high) in zip(pieces.row_spans, pieces.col_spans, strict=True):
            row, first = start // width, start % width
            working[row, first : first + end - start, pieces.columns[low:high] % width] = True
        for start, end in pieces.blocks:
            row, first, last = start // width, start % width, start % width + end - start
            working[row, first:last, first:last] = True
        for stray in pieces.strays:
            working[(stray.rows // width)[:, None], (stray.rows % width)[:, None], stray.columns % width] = True
        if pieces.order is None:
            return torch.from_numpy(working)
        token = (pieces.order % width).reshape(rows, width)
        mask = np.empty_like(working)
        mask[np.arange(rows)[:, None, None], token[:, :, None], token[:, None, :]] = working
        return torch.from_numpy(mask)

    def made(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` returns, made once for each key: index tensors of a kernel, built at the first layer."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _check(modality_ids: Tensor, segment_ids: Tensor, scored: Tensor, rule: str, options: RuleOptions) -> None:
    shape = tuple(modality_ids.shape)
    if rule not in RULES:
        raise MaskError(f"attention rule {rule!r} is unknown; choose one of {sorted(RULES)}.")
    if len(shape) != 2 or tuple(segment_ids.shape) != shape or tuple(scored.shape) != shape:
        raise MaskError(
            f"modality_ids {shape}, segment_ids {tuple(segment_ids.shape)} and scored {tuple(scored.shape)} "
            "must have one shape [rows, tokens]."
        )
    if scored.dtype != torch.bool:
        raise MaskError(f"scored must be bool, got {scored.dtype}; pass targets != IGNORE.")
    if options.visible_fraction != 1.0 and rule != "mma":
        raise MaskError(f"visible_fraction={options.visible_fraction} is for rule 'mma' only, got rule {rule!r}.")
    if not 0.0 <= options.visible_fraction <= 1.0:
        raise MaskError(f"visible_fraction={options.visible_fraction} must lie in [0, 1].")
    if options.selection not in ("prefix", "suffix", "random"):
        raise MaskError(f"selection {options.selection!r} is unknown; choose prefix, suffix or random.")
    if options.image_tokens < 0:
        raise MaskError(f"image_tokens={options.image_tokens} must be 0 or the number of latents of one image.")
