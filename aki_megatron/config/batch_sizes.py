"""How a step's global batch is divided: ranks -> data-parallel ranks -> micro-batches. The only place that computes it.

    global_batch_size = data_parallel_size x num_microbatches x micro_batch_size

Sizes count samples, or packed sequences where data.packing.enabled.
"""

import math

from aki_megatron.config.run import RunConfig
from aki_megatron.errors import ConfigError


def divisors(*numbers: int) -> list[int]:
    """Return the numbers that divide all of ``numbers``, in ascending order."""
    common = math.gcd(*numbers)
    small = [n for n in range(1, math.isqrt(common) + 1) if common % n == 0]
    return sorted({*small, *(common // n for n in small)})


def num_replicas(world_size: int, *, tensor: int, pipeline: int) -> int:
    """Return how many replicas of ``tensor`` x ``pipeline`` ranks make up the world.

    Raises ConfigError, with the nearest world sizes, where the replicas do not fill it.
    """
    replica = tensor * pipeline
    if world_size % replica:
        below = world_size // replica * replica
        near = " or ".join(str(n) for n in (below, below + replica) if n)
        raise ConfigError(
            f"{world_size} ranks cannot be divided into replicas of parallel.tensor={tensor} x "
            f"parallel.pipeline={pipeline} = {replica} ranks; start {near} ranks, or change the two."
        )
    return world_size // replica


def data_parallel_size(run: RunConfig, world_size: int) -> int:
    """Return the number of data-parallel ranks among ``world_size`` ranks. Raises ConfigError as num_replicas does."""
    return num_replicas(world_size, tensor=run.parallel.tensor, pipeline=run.parallel.pipeline)


def rank_batch_size(run: RunConfig, world_size: int) -> int:
    """Return the samples of one data-parallel rank in a step."""
    return run.train.global_batch_size // data_parallel_size(run, world_size)


def micro_batch_size(run: RunConfig, world_size: int) -> int:
    """Return the samples of one forward pass: the largest divisor of a rank's batch up to train.micro_batch_size."""
    return max(n for n in divisors(rank_batch_size(run, world_size)) if n <= run.train.micro_batch_size)


def num_microbatches(run: RunConfig, world_size: int) -> int:
    """Return the forward passes of one data-parallel rank in a step."""
    return rank_batch_size(run, world_size) // micro_batch_size(run, world_size)


def check_world(run: RunConfig, world_size: int) -> None:
    """Raise ConfigError, with the nearest values that fit, where the run does not fit on ``world_size`` ranks."""
    ranks, batch = data_parallel_size(run, world_size), run.train.global_batch_size
    if batch % ranks:
        near = " or ".join(str(n) for n in (batch // ranks * ranks, (batch // ranks + 1) * ranks) if n)
        raise ConfigError(
            f"train.global_batch_size={batch} cannot be divided equally among {ranks} data-parallel ranks; "
            f"use --train.global_batch_size {near}, "
            f"or a number of data-parallel ranks from {[n for n in divisors(batch) if n <= ranks]}."
        )
    asked, steps = run.deepspeed.get("gradient_accumulation_steps"), num_microbatches(run, world_size)
    if asked is not None and asked != steps:
        raise ConfigError(
            f"ds_config gradient_accumulation_steps={asked} but train.global_batch_size={batch} / "
            f"({ranks} data-parallel ranks x {micro_batch_size(run, world_size)} samples per forward pass) = {steps}; "
            'write "auto" in the ds_config, or change one of them.'
        )
