"""What rank 0 says of a run before it starts: the model's size, its cut, what a step is made of, and the bubble."""

from collections.abc import Iterator, Sequence

from aki_megatron.checkpoint.initial_weights import whole_parameters
from aki_megatron.config.cross_checks import data_size, divisors, micro_batch_size
from aki_megatron.config.run import RunConfig
from aki_megatron.parallel.pipeline_partition import costs_of
from aki_megatron.parallel.schedule import bubble, schedule


def describe(config: RunConfig, stages: Sequence[range], *, world_size: int) -> Iterator[str]:
    """Lines for a person. ``stages``: the decoder layers of each of the pipeline x virtual_stages stages."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in whole_parameters(config.model).values()]
    trained = sum(size for size, learns in sizes if learns)
    yield f"model: {sum(size for size, _ in sizes):,} parameters, {trained:,} of them trained"
    yield step_line(config, world_size)
    if len(stages) > 1:
        yield cut_line(config, stages)
    if config.parallel.pipeline > 1:
        yield from bubble_lines(config, world_size)


def step_line(config: RunConfig, world_size: int) -> str:
    """What a step is made of: samples over data ranks, ranks over the model, precision."""
    parallel, ranks, at_once = config.parallel, data_size(config, world_size), micro_batch_size(config, world_size)
    packing = config.data.packing
    rows = f"rows of {packing.sequence_length} places" if packing.enabled else "samples"
    spread = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
    if parallel.virtual_stages > 1:
        spread += f" (x {parallel.virtual_stages} chunks)"
    return (
        f"step: {config.train.global_batch_size} {rows} = {counted(ranks, 'data rank')} x "
        f"{counted(micro_batches(config, world_size), 'micro-batch', 'micro-batches')} x {at_once}; {spread}, "
        f"ZeRO-{parallel.zero_stage}, {config.train.precision}, rule {config.attention.rule}"
    )


def cut_line(config: RunConfig, stages: Sequence[range]) -> str:
    """Layers of each stage in model order, and each stage's share of the cost of a sample."""
    costs = costs_of(config.model, text_tokens=config.data.max_text_tokens, recompute=recomputes(config)).of(stages)
    parts = [f"{len(stage)}" for stage in stages]
    parts[0] = f"front + {parts[0]}"
    parts[-1] = f"{parts[-1]} + head"
    shares = [f"{part} ({cost / sum(costs):.0%})" for part, cost in zip(parts, costs, strict=True)]
    return f"cut: {' | '.join(shares)} layers; in brackets the share of the arithmetic"


def bubble_lines(config: RunConfig, world_size: int) -> Iterator[str]:
    """How long each pipeline rank waits if all stages take equally long, and how to shorten it where that is easy."""
    pipeline, count = config.parallel.pipeline, micro_batches(config, world_size)
    idle = bubble(schedule(pipeline=pipeline, chunks=config.parallel.virtual_stages, micro_batches=count))
    batches = counted(count, "micro-batch", "micro-batches")
    yield f"pipeline: {batches} through {pipeline} ranks; each is idle {idle:.0%} of the time (the bubble)"
    if count >= pipeline:
        return
    share = config.train.global_batch_size // data_size(config, world_size)
    smaller = max(n for n in divisors(share) if share // n >= pipeline or n == 1)
    if share // smaller > count:
        yield (
            f"hint: --train.micro_batch_size {smaller} gives {share // smaller} micro-batches, and the ranks are idle less "
            "of the time"
        )
    else:
        yield "hint: a larger train.global_batch_size gives more micro-batches, and the ranks are idle less of the time"


def counted(number: int, one: str, many: str = "") -> str:
    """1 data rank, 2 data ranks."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def micro_batches(config: RunConfig, world_size: int) -> int:
    """Micro-batches of each data rank in a step."""
    return config.train.global_batch_size // data_size(config, world_size) // micro_batch_size(config, world_size)


def recomputes(config: RunConfig) -> bool:
    """Whether layers run forward twice."""
    return config.parallel.recompute == "full"
