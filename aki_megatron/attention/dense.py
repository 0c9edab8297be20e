"""The dense backend: PyTorch's own attention with the whole [T, T] mask. The oracle of the other kernels.

Letters: B rows, T tokens, Hq query heads, Hkv key heads, d head width.
"""

import torch.nn.functional as F
from torch import Tensor

from aki_megatron.attention.layout import ModalityLayout


def attend_dense(q: Tensor, k: Tensor, v: Tensor, layout: ModalityLayout) -> Tensor:
    """Attention through a bool mask [B, 1, T, T]; rows that see nothing give 0."""
    mask = layout.made(("dense", q.device), lambda: layout.dense()[:, None].to(q.device))
    return attend_masked(q, k, v, mask)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention through any bool mask [B, 1, T, T], True where a row sees a column; rows that see nothing give 0."""
    # some of PyTorch's kernels give NaN gradients for empty rows: let them see themselves, then cut them off
    empty = ~mask.any(-1, keepdim=True)
    itself = mask.new_ones(mask.shape[-1]).diag()
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | (empty & itself), enable_gqa=q.shape[1] != k.shape[1])
    return out.masked_fill(empty, 0.0)
