"""AdamW as the papers' code sets it up: two parameter groups, a cosine that starts and ends at the minimum rate."""

import math
from typing import Any

import torch
from torch import nn

EMBEDDING = "embedding"
"""Name of the module that holds the token tables (base and extra rows) in the model's front."""


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: all but the token embedding tables decay.

    Norms, biases, latents and the head decay too: that is what the official release does (268 tensors decay, 2 do not).
    Empty groups are left out. Frozen parameters are in none.
    """
    kept = {name for name, _ in model.named_parameters() if EMBEDDING in name.split(".")}
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trainable if name not in kept], "weight_decay": weight_decay},
        {"params": [parameter for name, parameter in trainable if name in kept], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, *, weight_decay: float, beta1: float, beta2: float, eps: float) -> torch.optim.AdamW:
    """AdamW over the parameter groups of ``model``; the learning rate is set anew before every step."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=(beta1, beta2), eps=eps)


def learning_rate(step: int, *, lr: float, min_lr: float, warmup_steps: int, steps: int) -> float:
    """Rate of step ``step`` (0-based): linear from min_lr to lr at warmup_steps, then cosine to min_lr at ``steps``.

    Unlike the official code's curve it stays at min_lr past the end instead of rising again.
    """
    if step < warmup_steps:
        fraction = step / warmup_steps
    elif step >= steps:
        fraction = 0.0
    else:
        fraction = 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
    return min_lr + (lr - min_lr) * fraction
