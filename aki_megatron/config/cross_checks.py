"""Relations between the keys of a run. Every check yields sentences: the keys, their values, the way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from aki_megatron.config.combinations import refusals
from aki_megatron.config.deepspeed import problems_of_settings
from aki_megatron.errors import ConfigError

if TYPE_CHECKING:
    from aki_megatron.config.run import RunConfig


def report(where: str, problems: list[str]) -> str:
    """One message for all problems of one file."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return "\n".join([f"{where}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])


class ContradictionError(ConfigError):
    """Keys that are well formed one by one and wrong together."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(report("this run contradicts itself", problems))
        self.problems = problems


def divisors(*numbers: int) -> list[int]:
    """Numbers that divide all of ``numbers``."""
    return [n for n in range(1, min(numbers) + 1) if not any(number % n for number in numbers)]


def data_problems(run: RunConfig) -> Iterator[str]:
    """Captions come from tars and are learnt causally; conversations come from sources."""
    data = run.data
    if data.kind == "captions":
        if run.attention.rule != "causal":
            yield (
                f"data.kind=captions cannot be trained with attention.rule={run.attention.rule}: image places would "
                "look ahead at the caption, which is what is learnt, so the answer would leak; "
                "set attention.rule to causal."
            )
        if not data.captions:
            yield (
                "data.kind=captions needs data.captions, the tars to read; "
                'for example [{name: kale, shards: ["blip3_kale/{00000..31000}.tar"]}].'
            )
        if data.sources:
            yield "data.kind=captions reads data.captions; remove data.sources, or set data.kind to conversations."
    else:
        if not data.sources:
            yield "data.kind=conversations needs data.sources; for example [{name: vqav2, weight: 1}]."
        if data.captions:
            yield "data.kind=conversations reads data.sources; remove data.captions, or set data.kind to captions."
    for key, names in (("sources", [source.name for source in data.sources]),
                       ("captions", [captions.name for captions in data.captions])):  # fmt: skip
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            yield f"data.{key} names {', '.join(twice)} more than once; keep one entry with the sum of the weights."
    for captions in data.captions:
        if not captions.shards or any(not pattern.strip() for pattern in captions.shards):
            yield f"data.captions {captions.name}: shards holds an empty pattern or nothing; name the tars to read."
        if captions.format != "blip3_ocr" and captions.granularity != "basic text":
            yield (
                f"data.captions {captions.name}: granularity={captions.granularity} chooses among the descriptions of "
                f"format blip3_ocr, but format={captions.format}; remove granularity, or set the format."
            )
    for source in data.sources:
        if not source.split_turns and source.name != "llava150k":
            yield (
                f"data.sources {source.name}: split_turns=false is for llava150k, the source that has "
                "conversations; remove it."
            )


def phase_problems(run: RunConfig) -> Iterator[str]:
    """Phases fill the run, and name sources that there are."""
    data = run.data
    if not data.phases:
        return
    total = sum(phase.steps for phase in data.phases)
    if total != run.train.steps:
        yield (
            f"data.phases add up to {total} steps but train.steps={run.train.steps}; "
            f"add --train.steps {total}, or change the phases."
        )
    known = [entry.name for entry in (data.captions if data.kind == "captions" else data.sources)]
    for number, phase in enumerate(data.phases):
        unknown = [name for name in phase.sources if name not in known]
        if unknown:
            yield f"data.phases[{number}].sources names {', '.join(unknown)}; the run's sources are {', '.join(known)}."
        if phase.order == "text_first" and run.attention.rule != "causal":
            yield (
                f"data.phases[{number}].order=text_first cannot be trained with attention.rule={run.attention.rule}: "
                "the question stands before the image already; set attention.rule to causal."
            )


def packing_problems(run: RunConfig) -> Iterator[str]:
    """A row holds at least the longest sample, and its positions."""
    packing = run.data.packing
    longest = run.data.max_text_tokens + run.model.resampler.num_latents
    if packing.enabled and packing.sequence_length < longest:
        yield (
            f"data.packing.sequence_length={packing.sequence_length} is shorter than the longest sample, data.max_text_tokens + "
            f"model.resampler.num_latents = {longest}; set it to a multiple of that."
        )


def length_problems(run: RunConfig) -> Iterator[str]:
    """A sample fits the positions of the decoder. What one section can check alone, it checks itself (model.py)."""
    longest, latents = run.data.max_text_tokens, run.model.resampler.num_latents
    positions = run.model.decoder.rope.max_position_embeddings
    if longest + latents > positions:
        yield (
            f"data.max_text_tokens={longest} + model.resampler.num_latents={latents} = {longest + latents} places exceed "
            f"model.decoder.rope.max_position_embeddings={positions}; "
            f"set data.max_text_tokens to {max(1, positions - latents)} or less."
        )


def schedule_problems(run: RunConfig) -> Iterator[str]:
    """The learning-rate curve rises, then falls, within the run."""
    optimizer, steps = run.optimizer, run.train.steps
    if optimizer.warmup_steps >= steps:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be less than train.steps={steps}; "
            f"add --optimizer.warmup_steps {steps // 10}."
        )
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr={optimizer.min_lr:g} exceeds optimizer.lr={optimizer.lr:g}, the peak of the curve; "
            f"add --optimizer.min_lr {optimizer.lr / 10:g}."
        )


def init_problems(run: RunConfig) -> Iterator[str]:
    """Weights come from one place."""
    init = run.init
    parts = [name for name in ("vision", "language") if getattr(init, name) is not None]
    if init.weights is not None and parts:
        names = " and ".join(f"init.{name}={getattr(init, name)}" for name in parts)
        yield (
            f"init.weights={init.weights} brings every weight and excludes {names}; keep one and set the other to null."
        )


def parallel_problems(run: RunConfig) -> Iterator[str]:
    """Every rank gets whole heads and every stage a layer."""
    yield from tensor_problems(run)
    layers, parallel = run.model.decoder.num_layers, run.parallel
    stages = parallel.pipeline * parallel.virtual_stages
    if stages > layers:
        yield (
            f"parallel.pipeline={parallel.pipeline} x parallel.virtual_stages={parallel.virtual_stages} = {stages} stages for "
            f"model.decoder.num_layers={layers}; every stage needs a layer: choose pipeline x virtual_stages from 1 to {layers}."
        )
    elif parallel.layers_per_stage:
        problem = stage_layers_problem(layers, stages=stages, layers_per_stage=parallel.layers_per_stage)
        if problem:
            yield problem


def tensor_problems(run: RunConfig) -> Iterator[str]:
    """What tensor parallelism splits, it splits equally."""
    decoder, tensor = run.model.decoder, run.parallel.tensor
    split = {
        "num_heads": decoder.num_heads,
        "num_kv_heads": decoder.num_kv_heads,
        "intermediate_size": decoder.intermediate_size,
        "padded_vocab_size": decoder.padded_vocab_size,
    }
    uneven = [f"model.decoder.{name}={size}" for name, size in split.items() if size % tensor]
    if not uneven:
        return
    limit = ""
    if decoder.num_heads % tensor == 0 and decoder.num_kv_heads % tensor:
        limit = f" (every rank needs whole key and value heads, and there are only {decoder.num_kv_heads})"
    yield (
        f"parallel.tensor={tensor} does not divide {' and '.join(uneven)}{limit}; "
        f"choose tensor from {divisors(*split.values())}."
    )


def stage_layers_problem(layers: int, *, stages: int, layers_per_stage: Sequence[int]) -> str:
    """Why ``layers_per_stage`` does not deal ``layers`` into ``stages``; empty where it does."""
    shown, total = list(layers_per_stage), sum(layers_per_stage)
    if len(shown) != stages:
        return (
            f"parallel.layers_per_stage={shown} has {len(shown)} entries for parallel.pipeline x parallel.virtual_stages = "
            f"{stages} stages; give {stages} numbers whose sum is model.decoder.num_layers={layers}, "
            "or [] to cut by cost."
        )
    if total != layers:
        return (
            f"parallel.layers_per_stage={shown} deals out {total} layers, model.decoder.num_layers={layers}; "
            f"give {stages} numbers whose sum is {layers}, or [] to cut by cost."
        )
    return ""


def watch_problems(run: RunConfig) -> Iterator[str]:
    """What is watched can happen within the run."""
    watch, steps = run.watch, run.train.steps
    if watch.step_timeout > watch.init_timeout:
        yield (
            f"watch.step_timeout={watch.step_timeout:g} exceeds watch.init_timeout={watch.init_timeout:g}, the "
            f"longest time for anything; add --watch.init_timeout {watch.step_timeout:g}."
        )
    if watch.on_loss_spike != "off" and watch.loss_spike_window >= steps:
        yield (
            f"watch.on_loss_spike={watch.on_loss_spike} compares with the last watch.loss_spike_window={watch.loss_spike_window} steps, but "
            f"train.steps={steps}: nothing would ever be a spike; add --watch.loss_spike_window {max(1, steps // 10)}."
        )


CHECKS: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    data_problems,
    phase_problems,
    packing_problems,
    length_problems,
    schedule_problems,
    init_problems,
    parallel_problems,
    watch_problems,
)


def problems(run: RunConfig) -> list[str]:
    """Everything that is wrong with a run whatever the number of ranks."""
    found = [sentence for check in CHECKS for sentence in check(run)]
    found += problems_of_settings(run.deepspeed, run)
    # Last, and only for what divides: a size that can never work deserves its own message.
    return found or refusals(run)


def data_size(run: RunConfig, world_size: int) -> int:
    """Data-parallel ranks among ``world_size`` ranks."""
    return world_size // (run.parallel.tensor * run.parallel.pipeline)


def check_world(run: RunConfig, world_size: int) -> None:
    """Raise ConfigError where the run does not fit on ``world_size`` ranks; names the nearest values that do."""
    replica = run.parallel.tensor * run.parallel.pipeline
    if world_size % replica:
        below = world_size // replica * replica
        near = " or ".join(str(n) for n in (below, below + replica) if n)
        raise ConfigError(
            f"{world_size} ranks cannot be dealt into replicas of parallel.tensor={run.parallel.tensor} x "
            f"parallel.pipeline={run.parallel.pipeline} = {replica} ranks; start {near} ranks, or change the two."
        )
    ranks, batch = data_size(run, world_size), run.train.global_batch_size
    if batch % ranks:
        near = " or ".join(str(n) for n in (batch // ranks * ranks, (batch // ranks + 1) * ranks) if n)
        raise ConfigError(
            f"train.global_batch_size={batch} cannot be shared equally by {ranks} data ranks; "
            f"use --train.global_batch_size {near}, "
            f"or a number of data ranks from {[n for n in divisors(batch) if n <= ranks]}."
        )
    asked, steps = run.deepspeed.get("gradient_accumulation_steps"), batch // ranks // micro_batch_size(run, world_size)
    if asked is not None and asked != steps:
        raise ConfigError(
            f"ds_config gradient_accumulation_steps={asked} but train.global_batch_size={batch} / "
            f"({ranks} data ranks x {micro_batch_size(run, world_size)} samples at a time) = {steps}; "
            'write "auto" in the ds_config, or change one of them.'
        )


def micro_batch_size(run: RunConfig, world_size: int) -> int:
    """Samples per forward pass of one rank: the most that train.micro_batch_size allows and its share can be cut into."""
    share = run.train.global_batch_size // data_size(run, world_size)
    return max(n for n in divisors(share) if n <= run.train.micro_batch_size)
