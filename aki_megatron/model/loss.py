"""Training loss: a sum, not a mean, because only the engine knows the number of supervised tokens of the whole step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aki_megatron.types import IGNORE


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy (scalar) of logits [..., V] for targets [...], without those that are IGNORE.

    Computed in fp32 (fp64 for fp64 logits). Without a supervised target it is 0 with zero gradients.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction="sum", ignore_index=IGNORE)
