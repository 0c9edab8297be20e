"""The lines rank 0 prints before a run starts: model size, step, pipeline stages, pipeline bubble."""

from collections.abc import Iterator, Sequence

from aki_megatron.checkpoint.shapes import meta_parameters
from aki_megatron.config.batch_sizes import (
    data_parallel_size,
    divisors,
    micro_batch_size,
    num_microbatches,
    rank_batch_size,
)
from aki_megatron.config.run import RunConfig
from aki_megatron.config.trainable import PARTS
from aki_megatron.model.trainable import part_of
from aki_megatron.parallel.pipeline_partition import estimate_costs
from aki_megatron.parallel.schedule import bubble_fraction, build_schedule


def summary_lines(config: RunConfig, stages: Sequence[range], *, world_size: int) -> Iterator[str]:
    """Yield the summary of a run.

    stages  decoder layers of each of the pipeline x virtual_stages stages, in model order
    """
    plans = config.training_plans()
    total = sum(parameter.numel() for parameter in meta_parameters(config.model, plans[0]).values())
    yield f"model: {total:,} parameters, {trained_text(config, 0)}"
    for phase, plan in enumerate(plans):
        if phase and plan != plans[phase - 1]:
            begin = sum(each.steps for each in config.data.phases[:phase])
            yield f"phase {phase + 1}, from step {begin + 1:,}: {trained_text(config, phase)}"
    yield step_line(config, world_size)
    if len(stages) > 1:
        yield stages_line(config, stages)
    if config.parallel.pipeline > 1:
        yield from bubble_lines(config, world_size)


def trained_text(config: RunConfig, phase: int) -> str:
    """Return how many parameters a phase trains, in all and of each part, and how fast those that differ."""
    plan = config.training_plans()[phase]
    counts: dict[str, int] = {}
    for name, parameter in meta_parameters(config.model, plan).items():
        if parameter.requires_grad:
            counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    parts = []
    for name, count in counts.items():
        part = plan.part(name)
        rank = f" lora rank {plan.lora.rank}" if part.mode == "lora" and plan.lora else ""
        rate = f" at lr x {part.lr_factor:g}" if part.lr_factor != 1.0 else ""
        decay = f" with weight decay {part.weight_decay:g}" if part.weight_decay is not None else ""
        parts.append(f"{name}{rank} {count:,}{rate}{decay}")
    frozen = [name for name in PARTS if name not in counts]
    text = f"{sum(counts.values()):,} of them trained: {', '.join(parts)}"
    return text + (f"; frozen: {', '.join(frozen)}" if frozen else "")


def step_line(config: RunConfig, world_size: int) -> str:
    """Return how a step is split over data ranks and micro-batches, and the model over ranks."""
    parallel, packing = config.parallel, config.data.packing
    samples = f"sequences of {packing.sequence_length} tokens" if packing.enabled else "samples"
    layout = f"tensor {parallel.tensor} x pipeline {parallel.pipeline}"
    if parallel.virtual_stages > 1:
        layout += f" (x {parallel.virtual_stages} virtual stages)"
    return (
        f"step: {config.train.global_batch_size} {samples} = "
        f"{plural(data_parallel_size(config, world_size), 'data rank', 'data ranks')} x "
        f"{plural(num_microbatches(config, world_size), 'micro-batch', 'micro-batches')} x "
        f"{micro_batch_size(config, world_size)}; {layout}, "
        f"ZeRO-{parallel.zero_stage}, {config.train.precision}, rule {config.attention.rule}"
    )


def stages_line(config: RunConfig, stages: Sequence[range]) -> str:
    """Return the layers of each stage in model order, and each stage's fraction of the FLOPs of a sample."""
    recompute = uses_recompute(config)
    costs = estimate_costs(config.model, text_tokens=config.data.max_text_tokens, recompute=recompute).per_stage(stages)
    parts = [f"{len(stage)}" for stage in stages]
    parts[0] = f"input embedder + {parts[0]}"
    parts[-1] = f"{parts[-1]} + LM head"
    fractions = [f"{part} ({cost / sum(costs):.0%})" for part, cost in zip(parts, costs, strict=True)]
    return f"stages: {' | '.join(fractions)} layers; in parentheses the fraction of the FLOPs"


def bubble_lines(config: RunConfig, world_size: int) -> Iterator[str]:
    """Yield how long pipeline ranks are idle if all stages take equally long, and a hint to reduce it."""
    pipeline, count = config.parallel.pipeline, num_microbatches(config, world_size)
    virtual_stages = config.parallel.virtual_stages
    schedules = build_schedule(pipeline=pipeline, virtual_stages=virtual_stages, num_microbatches=count)
    batches = plural(count, "micro-batch", "micro-batches")
    idle = bubble_fraction(schedules)
    yield f"pipeline: {batches} through {pipeline} ranks; each is idle {idle:.0%} of the time (the bubble)"
    if count >= pipeline:
        return
    samples = rank_batch_size(config, world_size)
    smaller = max(n for n in divisors(samples) if samples // n >= pipeline or n == 1)
    if samples // smaller > count:
        yield (
            f"hint: --train.micro_batch_size {smaller} gives {samples // smaller} micro-batches, which reduces "
            "the idle time"
        )
    else:
        yield "hint: a larger train.global_batch_size gives more micro-batches, which reduces the idle time"


def plural(number: int, one: str, many: str) -> str:
    """Return ``1 data rank`` or ``2 data ranks``."""
    return f"{number} {one if number == 1 else many}"


def uses_recompute(config: RunConfig) -> bool:
    """Return whether decoder layers run forward a second time in the backward pass."""
    return config.parallel.recompute == "full"
