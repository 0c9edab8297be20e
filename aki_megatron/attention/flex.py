"""FlexAttention: an optional cross-check on CUDA. It compiles, and compiles again when shapes change.

Letters: B rows, T tokens, Hq query heads, Hkv key heads, d head width.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from aki_megatron.attention.mask import AttentionMask
from aki_megatron.attention.reference_mask import sees, token_facts


@cache
def _compiled() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(create_block_mask), torch.compile(flex_attention)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, layout: AttentionMask) -> Tensor:
    """Attention with the rule's own formula as mask function; rows that see nothing give 0."""
    create_block_mask, flex_attention = _compiled()
    facts = layout.made(
        ("flex facts", q.device),
        lambda: token_facts(layout.modality_ids, layout.segment_ids, layout.rule, layout.options).to(q.device),
    )
    empty = layout.made(("flex empty", q.device), lambda: ~layout.dense().any(-1).to(q.device))

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        # an empty row sees itself, so that no kernel divides by zero, and is cut off below
        return sees(facts, layout.rule, b, row, column) | (empty[b, row] & (row == column))

    (rows, width) = layout.shape
    block_mask = layout.made(
        ("flex", q.device), lambda: create_block_mask(mask_mod, rows, None, width, width, device=q.device)
    )
    out = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.masked_fill(empty[:, None, :, None], 0.0)
