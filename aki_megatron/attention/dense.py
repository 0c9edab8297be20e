"""Dense attention: PyTorch's own with the whole [T, T] mask of reference_mask.py, which no other kernel shares.

What the other kernels are checked against, and what runs in float32 and float64 on CUDA.
Letters: B sequences, T positions, Hq query heads, Hkv key heads, d head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aki_megatron.attention.mask import AttentionMask
from aki_megatron.attention.reference_mask import reference_mask


def attend_dense(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
    """q [B, Hq, T, d], k and v [B, Hkv, T, d] -> [B, Hq, T, d]; the mask is built once for all layers."""
    bias, empty = mask.cached(("dense", q.device, q.dtype), lambda: _bias(mask, q))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=q.shape[1] != k.shape[1])
    return out if empty is None else out.masked_fill(empty, 0.0)


def _bias(mask: AttentionMask, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The additive mask [B, 1, T, T] in ``like``'s dtype, and the queries [B, 1, T, 1] that see nothing, None if none.

    Kernels differ in what they make of an empty query, up to NaN gradients: here it sees all, and is zeroed afterwards.
    """
    modality_ids, segment_ids = torch.from_numpy(mask.modality_ids), torch.from_numpy(mask.segment_ids)
    seen = reference_mask(modality_ids, segment_ids, mask.attention, mask.image_tokens)[:, None].to(like.device)
    empty = ~seen.any(-1, keepdim=True)
    bias = torch.zeros(seen.shape, dtype=like.dtype, device=seen.device).masked_fill_(~(seen | empty), -torch.inf)
    return bias, empty if bool(empty.any()) else None
