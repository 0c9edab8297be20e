"""Build everything a run reads: tokenizer, templates, sources, phases, and which samples each step holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from aki_megatron.config.data import CaptionsConfig, DataConfig, PhaseConfig
from aki_megatron.config.run import RunConfig
from aki_megatron.data.bad_samples import BadSampleBudget
from aki_megatron.data.batch_planner import BatchPlanner, Phase
from aki_megatron.data.captions import TextFormat
from aki_megatron.data.fingerprint import Fingerprint, tokenizer_fingerprint
from aki_megatron.data.image import ImageOptions
from aki_megatron.data.loader import MicrobatchDataset, StepLoader
from aki_megatron.data.media import media_decoders, num_media_tokens
from aki_megatron.data.mixture import Mixture, SourcePass
from aki_megatron.data.packing import PackedSampler, PackingLimits
from aki_megatron.data.permutation import derive_seed
from aki_megatron.data.run_sources import SPLIT, open_conversations, source_fingerprints
from aki_megatron.data.sample_stream import MixtureStream, SampleStream, Source
from aki_megatron.data.shard_cache import ShardCache
from aki_megatron.data.shard_order import ShardOrder
from aki_megatron.data.shards import CaptionDataset
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.families.registry import FAMILIES
from aki_megatron.types import Caption

TOKENIZER_NAME = "tokenizer"
"""Name of the tokenizer's fingerprint; those of sources are ``source NAME``."""


@dataclass(frozen=True)
class DataPipeline:
    """The plans of one data rank's steps, and the dataset that turns plans into batches."""

    planner: BatchPlanner
    dataset: MicrobatchDataset


def build_tokenizer(config: RunConfig) -> Tokenizer:
    """Build the tokenizer of the decoder's family. Raises ConfigError unless the model's tables have its tokens."""
    tokenizer = Tokenizer(config.data.tokenizer, FAMILIES[config.model.decoder.family].chat)
    tokenizer.check_vocabulary(config.model.decoder)
    return tokenizer


def build_template(config: RunConfig, tokenizer: Tokenizer, *, text_first: bool = False) -> Template:
    """Build the template that renders this run's samples."""
    packing, positions = config.data.packing, config.model.decoder.rope.max_position_embeddings
    return Template(
        tokenizer,
        num_media_tokens=num_media_tokens(config.model),
        max_text_tokens=config.data.max_text_tokens,
        system_message=config.data.system_message,
        text_first=text_first,
        max_positions=min(positions, packing.sequence_length) if packing.enabled else positions,
        max_media=packing.max_images if packing.enabled else None,
    )


def run_phases(config: RunConfig) -> tuple[PhaseConfig, ...]:
    """Return the phases of a run; without any, one with all sources."""
    return config.data.phases or (PhaseConfig(steps=config.train.steps),)


def phase_seed(seed: int, phase: int) -> int:
    """Return the seed of a phase's order of samples; the first phase's is the run's own."""
    return derive_seed("phase", seed, phase) if phase else seed


def image_options(config: DataConfig) -> ImageOptions:
    """Return how the images of a run are decoded."""
    return ImageOptions(config.images.transparency, config.images.exif_rotation)


def open_captions(config: DataConfig, captions: CaptionsConfig, progress: Callable[[str], None]) -> CaptionDataset:
    """Open one set of tars; ``progress`` gets a line now and then while tars are indexed."""
    return CaptionDataset(
        captions.shards,
        config.root,
        text_format=TextFormat(captions.format, captions.granularity),
        cache=ShardCache(config.cache, int(config.cache_gigabytes * 1e9)),
        progress=progress,
        skip_missing=captions.skip_missing,
    )


def build_sources(config: DataConfig, progress: Callable[[str], None], split: str = SPLIT) -> dict[str, Source[Any]]:
    """Open every source of a run by name, once however many phases use it.

    progress  as in open_captions; it also gets what is left out of annotation files
    split     of the datasets that have several
    """
    if config.kind == "captions":
        datasets = {captions.name: open_captions(config, captions, progress) for captions in config.captions}
        return {
            name: Source(
                dataset,
                read_text=partial(dataset.caption, with_image=False),
                locate=dataset.location,
                counts=dataset.counts,
            )
            for name, dataset in datasets.items()
        }
    return {**open_conversations(config, progress, split)}


def data_fingerprints(
    config: DataConfig, tokenizer: Tokenizer, sources: Mapping[str, Source[Any]]
) -> dict[str, Fingerprint]:
    """Return the fingerprints of the tokenizer and of every source of build_sources, by name.

    Raises DataError where a file cannot be read.
    """
    found = {TOKENIZER_NAME: tokenizer_fingerprint(tokenizer.folder, tokenizer.num_tokens)}
    if config.kind == "captions":
        of_sources = {name: source.items.fingerprint for name, source in sources.items()}  # type: ignore[attr-defined]
    else:
        of_sources = source_fingerprints(config, {name: len(source.items) for name, source in sources.items()})
    found.update({f"source {name}": fingerprint for name, fingerprint in of_sources.items()})
    return found


def _with_prefix(limits: Sequence[float], seed: int, caption: Caption, n: int) -> Caption:
    """Return the caption of sample ``n``, of which a fraction between two limits is prompt: uniform, by number."""
    low, high = limits
    return replace(caption, prefix=low + (high - low) * (derive_seed("caption prefix", seed, n) / 2**64))


def source_weights(config: DataConfig, sources: Mapping[str, Source[Any]]) -> dict[str, float]:
    """Return the weight of every source in the mixture; not normalized."""
    entries = config.captions if config.kind == "captions" else config.sources
    if config.mixing == "proportional":
        return {entry.name: float(len(sources[entry.name].items)) for entry in entries}
    return {entry.name: entry.weight if config.mixing == "weights" else 1.0 for entry in entries}


def build_stream(
    config: RunConfig, tokenizer: Tokenizer, sources: Mapping[str, Source[Any]], phase: int
) -> SampleStream:
    """Build the stream of numbered samples of one phase."""
    data, phase_config, mixture = config.data, run_phases(config)[phase], phase_mixture(config, sources, phase)
    template = build_template(config, tokenizer, text_first=phase_config.order == "text_first")
    chosen = {
        name: _with_order(sources[name], mixture.passes[name].seed, name, data.shards_per_block)
        for name in mixture.names
    }
    render: Callable[[Any], Any] = template.render_conversation
    prepare = None
    if data.kind == "captions":
        render = template.render_caption
        prepare = partial(_with_prefix, data.caption_prefix, mixture.seed) if data.caption_prefix else None
    decoders = media_decoders(config.model, image_options(data))
    return MixtureStream(chosen, mixture, render, decoders=decoders, prepare=prepare)


def phase_mixture(config: RunConfig, sources: Mapping[str, Source[Any]], phase: int) -> Mixture:
    """Return the mixture of a phase: it goes on with each source where the earlier phases stopped.

    How many samples a packed phase takes depends on their lengths, so packed phases begin anew, each in its own order.
    """
    weights = source_weights(config.data, sources)
    passes: dict[str, SourcePass] = {}
    for number, phase_config in enumerate(run_phases(config)[: phase + 1]):
        names = phase_config.sources or tuple(weights)
        mixture = Mixture(
            {name: weights[name] for name in names},
            seed=phase_seed(config.train.seed, number),
            passes=passes,
            num_items={name: len(sources[name].items) for name in names},
        )
        if number < phase and not config.data.packing.enabled:
            passes |= mixture.passes_after(phase_config.steps * config.train.global_batch_size)
    return mixture


def _with_order(source: Source[Any], seed: int, name: str, shards_per_block: int) -> Source[Any]:
    """Return a source of tars or row groups with an order that reads few of them at a time; others as they are."""
    if source.counts is None:
        return source
    return replace(source, order=ShardOrder(source.counts, seed=seed, name=name, shards_per_block=shards_per_block))


def build_packed_sampler(config: RunConfig, stream: SampleStream, phase: int) -> PackedSampler | None:
    """Build the packing of one phase's samples; None where every sample has a sequence of its own."""
    packing = config.data.packing
    if not packing.enabled:
        return None
    seed = derive_seed("rows", phase_seed(config.train.seed, phase))
    limits = PackingLimits(packing.sequence_length, packing.max_images)
    return PackedSampler(stream.length, limits, buffer_size=packing.buffer_size, seed=seed)


def build_data_pipeline(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    micro_batch_size: int,
    data_rank: int = 0,
    data_size: int = 1,
    sources: Mapping[str, Source[Any]] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> DataPipeline:
    """Build everything that data rank ``data_rank`` of ``data_size`` reads.

    sources   of build_sources; None opens them
    progress  as in open_captions
    """
    if sources is None:
        sources = build_sources(config.data, progress)
    streams = [build_stream(config, tokenizer, sources, phase) for phase in range(len(run_phases(config)))]
    phases = [
        Phase(phase_config.steps, stream, build_packed_sampler(config, stream, phase))
        for phase, (phase_config, stream) in enumerate(zip(run_phases(config), streams, strict=True))
    ]
    packing = config.data.packing
    return DataPipeline(
        planner=BatchPlanner(
            phases,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=micro_batch_size,
            data_rank=data_rank,
            data_size=data_size,
        ),
        dataset=MicrobatchDataset(
            streams,
            pad_id=tokenizer.pad_id,
            image_size=config.model.vision.image_size,
            sequence_length=packing.sequence_length if packing.enabled else None,
        ),
    )


def build_step_loader(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
    pin_memory: bool,
    sources: Mapping[str, Source[Any]] | None = None,
    progress: Callable[[str], None],
) -> StepLoader:
    """Build the loader of one data rank; arguments as in build_data_pipeline and StepLoader."""
    pipeline = build_data_pipeline(
        config,
        tokenizer,
        micro_batch_size=micro_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        sources=sources,
        progress=progress,
    )
    return StepLoader(
        pipeline.planner,
        pipeline.dataset,
        bad_sample_budget=BadSampleBudget(config.data.max_bad_fraction),
        num_workers=config.data.num_workers,
        prefetch_steps=config.data.prefetch_steps,
        pin_memory=pin_memory,
    )
