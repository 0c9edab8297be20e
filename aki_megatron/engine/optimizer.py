"""AdamW as the official release sets it up: all parameters but the embeddings decay; cosine learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from aki_megatron.engine.global_state import MOMENTS
from aki_megatron.model.sharding import shard_spec
from aki_megatron.model.stage import TIED_PARAMETERS, Stage, global_names

EMBEDDING = "token_embedding"
"""Name of the module that holds the token embedding tables, of the vocabulary and of added tokens."""


def parameter_groups(stage: Stage, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters of a stage in groups; all but the token embedding tables decay.

    Norms, biases, latents and the LM head decay too, as in the official release (268 tensors decay, 2 do not).
    Parameters of one group also agree on ``tensor_sharded`` (tensor ranks hold shards, not copies) and ``tied`` (the
    first and the last stage hold the same parameters), which the gradient norm and the exchange of tied gradients need.
    Empty groups are left out; frozen parameters are in none.
    """
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    names, decoder = global_names(stage), stage.config.decoder
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            decays, is_sharded = EMBEDDING not in names[name].split("."), shard_spec(name, decoder) is not None
            tied = decoder.tie_word_embeddings and names[name] in TIED_PARAMETERS.values()
            groups.setdefault((tied, is_sharded, decays), []).append(parameter)
    return [
        {
            "params": groups[key],
            "weight_decay": weight_decay if key[2] else 0.0,
            "tensor_sharded": key[1],
            "tied": key[0],
        }
        for key in sorted(groups)
    ]


def adamw(
    stage: Stage, *, weight_decay: float, beta1: float, beta2: float, eps: float, fused: bool = False
) -> torch.optim.AdamW:
    """Return AdamW over the parameter groups of ``stage``; the learning rate is set before every step.

    fused  use torch's single-pass kernel, which makes AdamW on the CPU fast enough for offloaded state
    """
    groups = parameter_groups(stage, weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=eps, fused=fused or None)


def init_moments(optimizer: torch.optim.AdamW, parameters: Iterable[Tensor]) -> None:
    """Create AdamW's zero state of ``parameters``, its own or flat master weights in their place.

    AdamW itself creates it in the first step, but a checkpoint may be loaded or saved before that.
    """
    fused = bool(optimizer.defaults["fused"])
    for parameter in parameters:
        state = optimizer.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else None)
        for moment in MOMENTS:
            state[moment] = torch.zeros_like(parameter, requires_grad=False)


def learning_rate(step: int, *, lr: float, min_lr: float, warmup_steps: int, steps: int) -> float:
    """Return the rate of 0-based ``step``: linear from min_lr to lr at warmup_steps, cosine to min_lr at ``steps``.

    Without warm-up steps the first step has lr. Past the end it stays at min_lr, where the official code's curve rises
    again.
    """
    if step < warmup_steps:
        fraction = step / warmup_steps
    elif step >= steps:
        fraction = 0.0
    else:
        fraction = 0.5 * (1.0 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))
    return min_lr + (lr - min_lr) * fraction
