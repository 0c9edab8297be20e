"""AdamW as the papers' code sets it up: all but the embeddings decay; a cosine from the minimum rate back to it."""

import math
from typing import Any

import torch
from torch import nn

from aki_megatron.model.split import split_of
from aki_megatron.model.stage import TIED, Stage, global_names

EMBEDDING = "embedding"
"""Name of the module that holds the token tables (base and extra rows) in the model's front."""


def parameter_groups(stage: Stage, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters of a stage: all but the token embedding tables decay.

    Norms, biases, latents and the head decay too: that is what the official release does (268 tensors decay, 2 do not).
    Parameters of one group also agree on ``split`` (tensor ranks hold shares, not copies) and ``tied`` (the first and
    the last stage hold the same), which the norm and the exchange of tied gradients go by. Empty groups are left out,
    frozen parameters are in none.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    logical, decoder = global_names(stage), stage.config.decoder
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            decays, split = EMBEDDING not in logical[name].split("."), split_of(name, decoder) is not None
            tied = decoder.tie_word_embeddings and logical[name] in TIED.values()
            groups.setdefault((tied, split, decays), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": weight_decay if key[2] else 0.0, "split": key[1], "tied": key[0]}
        for key in sorted(groups)
    ]


def adamw(
    stage: Stage, *, weight_decay: float, beta1: float, beta2: float, eps: float, fused: bool = False
) -> torch.optim.AdamW:
    """AdamW over the parameter groups of ``stage``; the learning rate is set anew before every step.

    ``fused``: torch's single-pass kernel, which makes AdamW on the host's processor fast enough for offloaded states.
    """
    groups = parameter_groups(stage, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=eps, fused=fused or None)


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
