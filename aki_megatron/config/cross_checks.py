"""Checks of the sections of a run against each other. Each yields sentences: keys, their values, what to change."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import isqrt

from aki_megatron.config.attention import ATTENTION_RULES, rules_for_supervised_text
from aki_megatron.config.batch_sizes import divisors
from aki_megatron.config.combinations import refusals
from aki_megatron.config.data import DataConfig
from aki_megatron.config.deepspeed import problems_of_settings
from aki_megatron.config.evaluate_checks import evaluate_problems
from aki_megatron.config.field_info import list_problems
from aki_megatron.config.run import RunConfig
from aki_megatron.config.source_checks import source_problems
from aki_megatron.config.trainable_checks import trainable_problems
from aki_megatron.config.validation_checks import validation_problems
from aki_megatron.errors import ConfigError
from aki_megatron.families.base import ENDOFCHUNK_TOKEN, IMAGE_TOKEN, PAD_TOKEN
from aki_megatron.families.registry import FAMILIES

ADDED_TOKENS = (PAD_TOKEN, IMAGE_TOKEN, ENDOFCHUNK_TOKEN)


class ContradictionError(ConfigError):
    """Sections that are valid alone and contradict each other; ``problems`` holds a sentence per contradiction."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(list_problems("this run contradicts itself", problems))
        self.problems = problems


def _caption_prefix_problems(data: DataConfig) -> Iterator[str]:
    """Check that the prefix is a range of fractions below 1 of captions that follow their image."""
    limits = data.caption_prefix
    if len(limits) != 2 or not 0.0 <= limits[0] <= limits[1] < 1.0:
        yield (
            f"data.caption_prefix={list(limits)} must be [low, high] with 0 <= low <= high < 1, for example [0.0, 0.5]."
        )
    if data.kind != "captions":
        yield "data.caption_prefix is for data.kind=captions; conversations have prompts of their own: remove it."
    if any(phase.order == "text_first" for phase in data.phases):
        yield (
            "data.caption_prefix makes a prompt of text after an image, but a phase has order=text_first, where the "
            "image comes last; remove one of them."
        )


def data_problems(run: RunConfig) -> Iterator[str]:
    """Check that the sources fit data.kind, and that the attention rule cannot see the supervised text."""
    data = run.data
    if data.kind == "captions":
        if ATTENTION_RULES[run.attention.rule].needs_prompt_after_image and not data.caption_prefix:
            yield (
                f"data.kind=captions cannot be trained with attention.rule={run.attention.rule}: image positions would "
                "look ahead at the caption, which is supervised, so the answer would leak; "
                f"set attention.rule to {rules_for_supervised_text()}, or let a first part of every caption be prompt: "
                "data.caption_prefix [0.0, 0.5]."
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
    if data.caption_prefix:
        yield from _caption_prefix_problems(data)
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


def system_message_problems(run: RunConfig) -> Iterator[str]:
    """Check that the system message holds no marker of the chat format, which is written around it."""
    chat = FAMILIES[run.model.decoder.family].chat
    found = [token for token in (*chat.special_tokens, *ADDED_TOKENS) if token in run.data.system_message]
    if found:
        yield (
            f"data.system_message contains {', '.join(found)}, which would end or begin a message; remove it: the "
            f"markers of model.decoder.family={run.model.decoder.family} are written around the system message."
        )


def phase_problems(run: RunConfig) -> Iterator[str]:
    """Check that the phases fill the run and name its sources."""
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
        if phase.order == "text_first" and ATTENTION_RULES[run.attention.rule].needs_prompt_after_image:
            yield (
                f"data.phases[{number}].order=text_first cannot be trained with attention.rule={run.attention.rule}: "
                "the question already precedes the image; "
                f"set attention.rule to {rules_for_supervised_text()}."
            )


def packing_problems(run: RunConfig) -> Iterator[str]:
    """Check that a packed sequence holds the longest sample."""
    packing = run.data.packing
    longest = run.data.max_text_tokens + run.model.max_media_positions
    if packing.enabled and packing.sequence_length < longest:
        yield (
            f"data.packing.sequence_length={packing.sequence_length} is shorter than the longest sample, "
            f"data.max_text_tokens + {_latents_text(run)} = {longest}; set it to a multiple of that."
        )


def _latents_text(run: RunConfig) -> str:
    """Return the keys whose sum is ModelConfig.max_media_positions."""
    return "model.resampler.num_latents" + " + model.audio.resampler.num_latents" * (run.model.audio is not None)


def length_problems(run: RunConfig) -> Iterator[str]:
    """Check that the longest sample fits into the positions of the decoder."""
    longest, latents = run.data.max_text_tokens, run.model.max_media_positions
    positions = run.model.decoder.rope.max_position_embeddings
    if longest + latents > positions:
        yield (
            f"data.max_text_tokens={longest} + {_latents_text(run)}={latents} = {longest + latents} positions "
            f"exceed model.decoder.rope.max_position_embeddings={positions}; "
            f"set data.max_text_tokens to {max(1, positions - latents)} or less."
        )


def schedule_problems(run: RunConfig) -> Iterator[str]:
    """Check that the warm-up ends within the run and that the peak is the largest learning rate."""
    optimizer, steps = run.optimizer, run.train.steps
    if optimizer.warmup_steps >= steps:
        yield (
            f"optimizer.warmup_steps={optimizer.warmup_steps} must be less than train.steps={steps}; "
            f"add --optimizer.warmup_steps {steps // 10}."
        )
    if optimizer.min_lr > optimizer.lr:
        yield (
            f"optimizer.min_lr={optimizer.min_lr:g} exceeds optimizer.lr={optimizer.lr:g}, the peak learning rate; "
            f"add --optimizer.min_lr {optimizer.lr / 10:g}."
        )


def init_problems(run: RunConfig) -> Iterator[str]:
    """Check that each part of the model is loaded from one source."""
    init = run.init
    if init.audio is not None and run.model.audio is None:
        yield (
            f"init.audio={init.audio} is for an audio encoder, but model.audio is null; give its sizes under "
            "model.audio, or remove init.audio."
        )
    parts = [name for name in ("vision", "audio", "language") if getattr(init, name) is not None]
    if init.weights is not None and parts:
        names = " and ".join(f"init.{name}={getattr(init, name)}" for name in parts)
        yield (
            f"init.weights={init.weights} loads all weights and excludes {names}; keep one and set the other to null."
        )


def attention_problems(run: RunConfig) -> Iterator[str]:
    """Check that the latents of an image form the square grid that the rule needs."""
    latents = run.model.resampler.num_latents
    side = isqrt(latents)
    if ATTENTION_RULES[run.attention.rule].square_images and side * side != latents:
        yield (
            f"attention.rule={run.attention.rule} needs a square grid of latents, but "
            f"model.resampler.num_latents={latents}; set it to {side * side} or {(side + 1) ** 2}."
        )


def parallel_problems(run: RunConfig) -> Iterator[str]:
    """Check that every tensor-parallel rank gets whole heads and every pipeline stage a layer."""
    yield from tensor_problems(run)
    layers, parallel = run.model.decoder.num_layers, run.parallel
    stages = parallel.pipeline * parallel.virtual_stages
    if stages > layers:
        yield (
            f"parallel.pipeline={parallel.pipeline} x parallel.virtual_stages={parallel.virtual_stages} = {stages} "
            f"stages for model.decoder.num_layers={layers}; every stage needs a layer: choose pipeline x "
            f"virtual_stages from 1 to {layers}."
        )
    elif parallel.layers_per_stage:
        problem = stage_layers_problem(layers, stages=stages, layers_per_stage=parallel.layers_per_stage)
        if problem:
            yield problem


def tensor_problems(run: RunConfig) -> Iterator[str]:
    """Check that all tensor-parallel ranks get equal shards."""
    decoder, tensor = run.model.decoder, run.parallel.tensor
    sharded = {
        "num_heads": decoder.num_heads,
        "num_kv_heads": decoder.num_kv_heads,
        "intermediate_size": decoder.intermediate_size,
        "padded_vocab_size": decoder.padded_vocab_size,
    }
    uneven = [f"model.decoder.{name}={size}" for name, size in sharded.items() if size % tensor]
    if not uneven:
        return
    limit = ""
    if decoder.num_heads % tensor == 0 and decoder.num_kv_heads % tensor:
        limit = f" (every rank needs whole key and value heads, and there are only {decoder.num_kv_heads})"
    yield (
        f"parallel.tensor={tensor} does not divide {' and '.join(uneven)}{limit}; "
        f"choose tensor from {divisors(*sharded.values())}."
    )


def stage_layers_problem(layers: int, *, stages: int, layers_per_stage: Sequence[int]) -> str:
    """Return why ``layers_per_stage`` does not distribute ``layers`` over ``stages``; empty where it does."""
    given, total = list(layers_per_stage), sum(layers_per_stage)
    if len(given) != stages:
        return (
            f"parallel.layers_per_stage={given} has {len(given)} entries for parallel.pipeline x "
            f"parallel.virtual_stages = {stages} stages; give {stages} numbers whose sum is "
            f"model.decoder.num_layers={layers}, or [] to balance by cost."
        )
    if total != layers:
        return (
            f"parallel.layers_per_stage={given} adds up to {total} layers, model.decoder.num_layers={layers}; "
            f"give {stages} numbers whose sum is {layers}, or [] to balance by cost."
        )
    return ""


def watch_problems(run: RunConfig) -> Iterator[str]:
    """Check that timeouts are ordered and that the window of the spike detection ends within the run."""
    watch, steps = run.watch, run.train.steps
    if watch.step_timeout > watch.init_timeout:
        yield (
            f"watch.step_timeout={watch.step_timeout:g} exceeds watch.init_timeout={watch.init_timeout:g}, the "
            f"longest time for any phase; add --watch.init_timeout {watch.step_timeout:g}."
        )
    if watch.on_loss_spike != "off" and watch.loss_spike_window >= steps:
        yield (
            f"watch.on_loss_spike={watch.on_loss_spike} compares with the last "
            f"watch.loss_spike_window={watch.loss_spike_window} steps, but train.steps={steps}: no spike would ever be "
            f"detected; add --watch.loss_spike_window {max(1, steps // 10)}."
        )


CHECKS: tuple[Callable[[RunConfig], Iterator[str]], ...] = (
    data_problems,
    source_problems,
    system_message_problems,
    phase_problems,
    packing_problems,
    length_problems,
    schedule_problems,
    trainable_problems,
    init_problems,
    attention_problems,
    parallel_problems,
    watch_problems,
    validation_problems,
    evaluate_problems,
)


def contradictions(run: RunConfig) -> list[str]:
    """Return everything that is wrong with a run whatever the number of ranks, a sentence each."""
    found = [sentence for check in CHECKS for sentence in check(run)]
    found += problems_of_settings(run.deepspeed, run)
    # Unsupported combinations come last: a size that can never work needs a message of its own.
    return found or refusals(run)


def check_run(run: RunConfig) -> None:
    """Raise ContradictionError, with all that is wrong, where sections of the run contradict each other."""
    if found := contradictions(run):
        raise ContradictionError(found)
