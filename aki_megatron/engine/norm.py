"""Exact global gradient norm and clipping over gradients that are distributed over ranks in disjoint parts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def squared_norm(gradients: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of squares of all elements, float64 scalar on ``device``; summed over ranks: the squared norm."""
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=torch.float64)).square().sum().to(device)


def clip_factor(norm: float, max_norm: float) -> float:
    """Return the factor that brings gradients of this norm to at most ``max_norm``, as torch's clip_grad_norm_ does."""
    assert math.isfinite(norm)
    return min(1.0, max_norm / (norm + 1e-6))
