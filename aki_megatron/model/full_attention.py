"""Attention without a mask, for encoders and resamplers."""

import torch.nn.functional as F
from torch import Tensor


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from every query to every key: q [N, H, Q, d], k and v [N, H, K, d] -> [N, H, Q, d]; N may be 0."""
    if q.shape[0] == 0:
        # the fused CUDA kernels reject an empty batch (pytorch/pytorch#133780); gradients must still be zero
        return (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)
