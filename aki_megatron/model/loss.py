"""The training loss. A sum, not a mean: who divides knows how many tokens the whole step supervises."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aki_megatron.types import IGNORE


def token_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross entropy, a scalar, of logits [..., V] for targets [...]; IGNORE counts nothing.

    Computed in fp32 (fp64 logits stay fp64). Without a supervised target it is 0 with zero gradients.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction="sum", ignore_index=IGNORE)
