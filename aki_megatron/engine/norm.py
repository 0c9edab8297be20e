"""Exact global gradient norm and clipping over gradients that lie in disjoint pieces on many ranks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares of all elements, float64 scalar on ``device``; over the ranks they add up to the norm's square."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64)).square().sum().to(device)


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply gradients by to bring their norm to at most ``limit``, as torch's clip_grad_norm_ does."""
    assert math.isfinite(norm)
    return min(1.0, limit / (norm + 1e-6))
