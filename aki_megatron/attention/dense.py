"""The dense backend: PyTorch's own attention with the whole [T, T] mask. The oracle of the other kernels.

Letters: B rows, T tokens, Hq query heads, Hkv key heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aki_megatron.attention.mask import AttentionMask


def attend_dense(q: Tensor, k: Tensor, v: Tensor, layout: AttentionMask) -> Tensor:
    """Attention through the layout's mask, made once for all layers; rows that see nothing give 0."""
    bias, empty = layout.made(("dense", q.device, q.dtype), lambda: open_mask(layout.dense()[:, None].to(q.device), q))
    return _attend(q, k, v, bias, empty)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention through any bool mask [B, 1, T, T], True where a row sees a column; rows that see nothing give 0."""
    return _attend(q, k, v, *open_mask(mask, q))


def open_mask(mask: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The additive mask in ``like``'s dtype, and the rows [B, 1, T, 1] that see nothing, None if there are none.

    Kernels differ in what they make of an empty row, up to NaN gradients: here it sees all, and is cut off afterwards.
    """
    empty = ~mask.any(-1, keepdim=True)
    bias = torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(~(mask | empty), -torch.inf)
    return bias, empty if bool(empty.any()) else None


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, empty: Tensor | None) -> Tensor:
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])
    return out if empty is None else out.masked_fill(empty, 0.0)
