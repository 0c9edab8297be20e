"""What a run reads: tokenizer, templates, sources, phases, and which sample each row of each step holds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from aki_megatron.config.data import CaptionsConfig, DataConfig, PhaseConfig
from aki_megatron.config.run import RunConfig
from aki_megatron.data.batch_planner import BatchPlanner, Phase
from aki_megatron.data.captions import TextFormat
from aki_megatron.data.chat import CHATS
from aki_megatron.data.fetch import ShardCache
from aki_megatron.data.loader import MicroBatches
from aki_megatron.data.mixture import Mixture, keyed
from aki_megatron.data.packing import Limits, PackedSampler
from aki_megatron.data.sample_stream import MixedStream, SampleStream, Source
from aki_megatron.data.shard_order import ShardOrder
from aki_megatron.data.shards import ShardIndex
from aki_megatron.data.sources import open_sources
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenSegments:
    """The steps of one data rank as numbers, and what turns numbers into batches."""

    planner: BatchPlanner
    micro_batches: MicroBatches


def build_tokenizer(config: RunConfig) -> Tokenizer:
    """The tokenizer of the decoder's family, proven to have exactly the tokens the model's tables have."""
    tokenizer = Tokenizer(config.data.tokenizer, CHATS[config.model.decoder.family])
    tokenizer.check_vocabulary(config.model.decoder)
    return tokenizer


def build_template(config: RunConfig, tokenizer: Tokenizer, *, text_first: bool = False) -> Template:
    """How text becomes tokens in this run."""
    return Template(
        tokenizer,
        image_tokens=config.model.resampler.num_latents,
        max_text_tokens=config.data.max_text_tokens,
        system_message=config.data.system_message,
        text_first=text_first,
    )


def phases_of(config: RunConfig) -> tuple[PhaseConfig, ...]:
    """The phases of a run; without any, one with all sources."""
    return config.data.phases or (PhaseConfig(steps=config.train.steps),)


def phase_seed(seed: int, phase: int) -> int:
    """Decides the order of samples of a phase; the first phase's is the run's own."""
    return keyed("phase", seed, phase) if phase else seed


def open_index(config: DataConfig, captions: CaptionsConfig, progress: Callable[[str], None]) -> ShardIndex:
    """One set of tars."""
    return ShardIndex(
        captions.shards,
        config.root,
        form=TextFormat(captions.format, captions.granularity),
        cache=ShardCache(config.cache, int(config.cache_gigabytes * 1e9)),
        progress=progress,
    )


def open_data(config: DataConfig, progress: Callable[[str], None]) -> dict[str, Source[Any]]:
    """Every source of a run by name, each read once however many phases use it."""
    if config.kind == "captions":
        indices = {captions.name: open_index(config, captions, progress) for captions in config.captions}
        return {name: Source(index, peek=partial(index.caption, picture=False)) for name, index in indices.items()}
    whole = [source.name for source in config.sources if not source.split_turns]
    names = [source.name for source in config.sources]
    opened = open_sources(config.root, names, "train", whole_dialogues=whole)
    return {source.name: Source(opened[source.name], augment=source.augment == "official") for source in config.sources}


def shares(config: DataConfig, sources: Mapping[str, Source[Any]]) -> dict[str, float]:
    """Weight of every source."""
    entries = config.captions if config.kind == "captions" else config.sources
    if config.mixing == "proportional":
        return {entry.name: float(len(sources[entry.name].elements)) for entry in entries}
    return {entry.name: entry.weight if config.mixing == "weights" else 1.0 for entry in entries}


def build_stream(
    config: RunConfig, tokenizer: Tokenizer, sources: Mapping[str, Source[Any]], phase: int
) -> SampleStream:
    """The numbered samples of one phase."""
    data, described, seed = config.data, phases_of(config)[phase], phase_seed(config.train.seed, phase)
    weights = shares(data, sources)
    names = described.sources or tuple(weights)
    template = build_template(config, tokenizer, text_first=described.order == "text_first")
    chosen = {name: sources[name] for name in names}
    render: Callable[[Any], Any] = template.render_conversation
    if data.kind == "captions":
        render = template.render_caption
        chosen = {
            name: replace(source, order=_order(source.elements, seed, name, data.shards_per_block))
            for name, source in chosen.items()
        }
    mixture = Mixture({name: weights[name] for name in names}, seed=seed)
    return MixedStream(chosen, mixture, render, image_size=config.model.vision.image_size)


def _order(index: Any, seed: int, name: str, shards_per_block: int) -> ShardOrder:
    return ShardOrder(index.counts, seed=seed, name=name, shards_per_block=shards_per_block)


def build_packing(config: RunConfig, stream: SampleStream, phase: int) -> PackedSampler | None:
    """How the samples of one phase fill rows; None where every sample has a row of its own."""
    packing = config.data.packing
    if not packing.enabled:
        return None
    key = keyed("rows", phase_seed(config.train.seed, phase))
    limits = Limits(packing.sequence_length, packing.max_images)
    return PackedSampler(stream.measure, limits, buffer_size=packing.buffer_size, key=key)


def build_reading(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    micro_rows: int,
    data_rank: int = 0,
    data_size: int = 1,
    progress: Callable[[str], None] = lambda line: None,
) -> TokenSegments:
    """Everything a data rank reads. ``micro_rows`` at a time; ``progress`` gets a line when indexing tars."""
    sources = open_data(config.data, progress)
    streams = [build_stream(config, tokenizer, sources, number) for number in range(len(phases_of(config)))]
    phases = [
        Phase(described.steps, stream, build_packing(config, stream, number))
        for number, (described, stream) in enumerate(zip(phases_of(config), streams, strict=True))
    ]
    packing = config.data.packing
    return TokenSegments(
        planner=BatchPlanner(
            phases,
            step_rows=config.train.global_batch_size,
            micro_batch_size=micro_rows,
            data_rank=data_rank,
            data_size=data_size,
        ),
        micro_batches=MicroBatches(
            streams,
            pad_id=tokenizer.pad,
            image_size=config.model.vision.image_size,
            sequence_length=packing.sequence_length if packing.enabled else None,
        ),
    )
