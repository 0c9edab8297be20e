"""AdamW as the official release sets it up: all parameters but the embeddings decay; cosine learning-rate schedule."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aki_megatron.config.trainable import DEFAULT_PLAN, TrainingPlan
from aki_megatron.engine.global_state import MOMENTS
from aki_megatron.model.sharding import shard_spec
from aki_megatron.model.stage import TIED_PARAMETERS, Stage, global_names
from aki_megatron.model.trainable import part_plan

EMBEDDING = "token_embedding"
"""Name of the module that holds the token embedding tables, of the vocabulary and of added tokens."""


class _GroupKey(NamedTuple):
    """What the parameters of one group agree on."""

    tied: bool
    tensor_sharded: bool
    decays: bool
    weight_decay: float
    lr_factor: float
    update_counter: int


def parameter_groups(stage: Stage, weight_decay: float, plan: TrainingPlan = DEFAULT_PLAN) -> list[dict[str, Any]]:
    """Return the trainable parameters of a stage in groups; all but the token embedding tables decay.

    Norms, biases, latents and the LM head decay too, as in the official release (268 tensors decay, 2 do not), unless
    ``plan`` gives their part a decay of its own.
    Parameters of one group also agree on ``tensor_sharded`` (tensor ranks hold shards, not copies) and ``tied`` (the
    first and the last stage hold the same parameters), which the gradient norm and the exchange of tied gradients need,
    and on their part's ``lr_factor`` and ``update_counter`` (PartPlan.since).
    Empty groups are left out; frozen parameters are in none.
    """
    groups: dict[_GroupKey, list[nn.Parameter]] = {}
    names, decoder = global_names(stage), stage.config.decoder
    for name, parameter in stage.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_plan(names[name], plan)
        decays = EMBEDDING not in names[name].split(".")
        key = _GroupKey(
            tied=decoder.tie_word_embeddings and names[name] in TIED_PARAMETERS.values(),
            tensor_sharded=shard_spec(name, decoder) is not None,
            decays=decays,
            weight_decay=(weight_decay if decays else 0.0) if part.weight_decay is None else part.weight_decay,
            lr_factor=part.lr_factor,
            update_counter=part.since,
        )
        groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[key],
            "weight_decay": key.weight_decay,
            "tensor_sharded": key.tensor_sharded,
            "tied": key.tied,
            "lr_factor": key.lr_factor,
            "update_counter": key.update_counter,
        }
        for key in sorted(groups)
    ]


def adamw(
    stage: Stage,
    *,
    weight_decay: float,
    beta1: float,
    beta2: float,
    eps: float,
    fused: bool = False,
    plan: TrainingPlan = DEFAULT_PLAN,
) -> torch.optim.AdamW:
    """Return AdamW over the parameter groups of ``stage``; ``set_learning_rate`` sets the rate before every step.

    fused  use torch's single-pass kernel, which makes AdamW on the CPU fast enough for offloaded state
    plan   what trains; the stage was built with it, and has a parameter that trains
    """
    groups = parameter_groups(stage, weight_decay, plan)
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=eps, fused=fused or None)


def set_learning_rate(optimizer: torch.optim.AdamW, lr: float) -> None:
    """Set the rate of every group: ``lr`` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


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
