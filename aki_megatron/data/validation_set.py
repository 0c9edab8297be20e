"""What a run validates on: the same samples in every validation, dealt to data ranks by micro-batches of one source.

Sample n of a source is a pure function of n, drawn, rendered, decoded and replaced where it is bad as in training: each
source is read as by a run that has no other. The first samples of its seeded order are used, whatever the seed of the
run, so that runs can be compared.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

from aki_megatron.config.batch_sizes import micro_batch_size, num_microbatches
from aki_megatron.config.data import CaptionsConfig, SourceConfig
from aki_megatron.config.datasets import DATASET_FORMAT
from aki_megatron.config.run import RunConfig
from aki_megatron.data.bad_samples import BadSampleBudget
from aki_megatron.data.batch_planner import DataState, MicrobatchPlan, StepPlan
from aki_megatron.data.loader import MicrobatchDataset, StepLoader
from aki_megatron.data.mixture import Mixture
from aki_megatron.data.packing import PackingLimits, pack
from aki_megatron.data.pipeline import build_sources, build_stream
from aki_megatron.data.run_sources import missing_source_files
from aki_megatron.data.sample_stream import SampleStream, Source
from aki_megatron.data.shards import missing_shards
from aki_megatron.data.sources import with_split
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import ConfigError
from aki_megatron.types import Conversation

SEED = 0
"""Of the order of a source's samples; the same for all runs."""


def validation_sources(config: RunConfig) -> tuple[SourceConfig | CaptionsConfig, ...]:
    """Return what a run validates on. Raises ConfigError where its own sources have no validation split."""
    validation = config.validation
    if config.data.kind == "captions":
        return validation.captions
    if validation.sources:
        return validation.sources
    names = [source.name for source in config.data.sources if source.format == DATASET_FORMAT]
    found = with_split(names, validation.split)
    if not found:
        raise ConfigError(
            f"validation.interval={validation.interval} needs a source with split {validation.split}, and none of "
            f"data.sources {', '.join(entry.name for entry in config.data.sources)} has it; name others in "
            "validation.sources, or set validation.interval to 0."
        )
    chosen = (source for source in config.data.sources if source.format == DATASET_FORMAT)
    return tuple(source for source in chosen if source.name in found)


def missing_validation_files(config: RunConfig) -> list[str]:
    """Return every file that the validation would read and that does not exist, with the source that needs it.

    Raises ConfigError as ``validation_sources`` does, and for a source that lacks the split.
    """
    if config.validation.interval == 0:
        return []
    root, entries = config.data.root, validation_sources(config)
    missing: list[str] = []
    for entry in entries:
        if isinstance(entry, CaptionsConfig):
            shards = [] if entry.skip_missing else missing_shards(entry.shards, root)
            missing += [f"{tar} (validation.captions {entry.name})" for tar in shards]
    files = missing_source_files(run_of_sources(config, entries).data, config.validation.split)
    return missing + [f"{file}, for validation" for file in files]


def run_of_sources(config: RunConfig, entries: Sequence[SourceConfig | CaptionsConfig]) -> RunConfig:
    """Return a run that reads these sources alone, each equally often, without augmentation, the image first."""
    sources = tuple(
        entry.model_copy(update={"augment": "none"}) for entry in entries if isinstance(entry, SourceConfig)
    )
    captions = tuple(entry for entry in entries if isinstance(entry, CaptionsConfig))
    chosen = {"sources": sources, "captions": captions, "phases": (), "mixing": "uniform"}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=chosen),
            "train": config.train.model_copy(update={"seed": SEED}),
        }
    )


class ValidationPlanner:
    """Deal the samples of every source to one data rank, in rounds of as many micro-batches as a training step has.

    Micro-batch m of round r of data rank d is number (r * num_microbatches + m) * data_size + d of all; each holds
    samples of one source, which is the ``phase`` of its plan. Those beyond the last are empty.
    """

    def __init__(
        self,
        streams: Sequence[SampleStream],
        num_samples: Sequence[int],
        *,
        micro_batch_size: int,
        num_microbatches: int,
        data_rank: int = 0,
        data_size: int = 1,
        packing: tuple[PackingLimits, int] | None = None,
    ) -> None:
        """
        streams, num_samples  of each source
        packing               limits of a packed sequence, and the samples that are packed at a time; None: one sample
                              per sequence
        """
        self.num_microbatches = num_microbatches
        self._streams = streams
        self.num_samples = num_samples
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._packing = packing

    @cached_property
    def plans(self) -> list[StepPlan]:
        """The rounds of this data rank; every rank has the same number. Packing measures each sample, once."""
        plans = self._plan_microbatches()
        per_round = self.num_microbatches * self._data_size
        rounds = []
        for number, first in enumerate(range(0, len(plans), per_round)):
            own = plans[first + self._data_rank : first + per_round : self._data_size]
            own += [_empty()] * (self.num_microbatches - len(own))
            rounds.append(StepPlan(number, tuple(own), {}))
        return rounds

    def plan_steps(self, start: int, state: DataState | None = None) -> Iterator[StepPlan]:
        """Yield the rounds, then empty ones without end."""
        yield from self.plans[start:]
        for number in count(max(start, len(self.plans))):
            yield StepPlan(number, (_empty(),) * self.num_microbatches, {})

    def _plan_microbatches(self) -> list[MicrobatchPlan]:
        plans, first = [], 0
        for source, (stream, num_samples) in enumerate(zip(self._streams, self.num_samples, strict=True)):
            sequences = self._sequences(stream, num_samples)
            numbered = list(enumerate(sequences, first))
            first += len(sequences)
            size = self._micro_batch_size
            plans += [
                MicrobatchPlan(source, tuple(numbered[begin : begin + size])) for begin in range(0, len(numbered), size)
            ]
        return plans

    def _sequences(self, stream: SampleStream, num_samples: int) -> list[tuple[int, ...]]:
        """Return the samples of each sequence of a source."""
        if self._packing is None:
            return [(number,) for number in range(num_samples)]
        limits, buffer_size = self._packing
        packed: list[tuple[int, ...]] = []
        for first in range(0, num_samples, buffer_size):
            numbers = range(first, min(first + buffer_size, num_samples))
            lengths, images = zip(*(stream.length(number) for number in numbers), strict=True)
            packed += [tuple(numbers[index] for index in sequence) for sequence in pack(lengths, images, limits)]
        return packed


def _empty() -> MicrobatchPlan:
    return MicrobatchPlan(0, ((0, ()),))


@dataclass(frozen=True)
class ValidationSet:
    """The samples of one data rank, and the questions of all.

    sources  opened, by name, in the order in which streams and results name them
    """

    config: RunConfig
    sources: Mapping[str, Source[Any]]
    planner: ValidationPlanner
    dataset: MicrobatchDataset
    pin_memory: bool = False

    def describe(self) -> str:
        """Return when and on what is validated, for people."""
        validation = self.config.validation
        parts = [f"{name} {size:,}" for name, size in zip(self.sources, self.planner.num_samples, strict=True)]
        questions = f", {validation.generate:,} questions of each answered" if validation.generate else ""
        interval = "step" if validation.interval == 1 else f"{validation.interval:,} steps"
        return f"validation: every {interval} on samples of {', '.join(parts)}{questions}"

    def open_loader(self) -> StepLoader:
        """Return a loader of the rounds that counts its bad samples from 0, as every validation does."""
        data = self.config.data
        return StepLoader(
            self.planner,
            self.dataset,
            bad_sample_budget=BadSampleBudget(data.max_bad_fraction),
            num_workers=data.num_workers,
            prefetch_steps=data.prefetch_steps,
            pin_memory=self.pin_memory,
        )

    def num_questions(self, name: str) -> int:
        """Return how many questions of a source are asked."""
        return min(self.config.validation.generate, len(self.sources[name].items))

    def question(self, name: str, number: int) -> Conversation:
        """Return question ``number`` of a source: the item of its sample ``number``. May raise DataError."""
        items = self.sources[name].items
        index = Mixture({name: 1.0}, seed=SEED).item_index(0, number, len(items))
        found: Conversation = items[index]
        return found


def build_validation_set(
    config: RunConfig,
    tokenizer: Tokenizer,
    *,
    world_size: int,
    data_rank: int,
    data_size: int,
    pin_memory: bool,
    progress: Callable[[str], None],
) -> ValidationSet:
    """Open the sources that data rank ``data_rank`` of ``data_size`` validates on; ``progress`` as in build_sources.

    Raises DataError where a source cannot be opened, and BadSampleBudgetExceeded where it has no readable sample.
    """
    entries, data, most = validation_sources(config), config.data, config.validation.samples
    sources = build_sources(run_of_sources(config, entries).data, progress, config.validation.split)
    streams = [
        build_stream(run_of_sources(config, [entry]), tokenizer, {entry.name: sources[entry.name]}, 0)
        for entry in entries
    ]
    for stream in streams:
        stream.sample(0)
    sizes = [len(sources[entry.name].items) for entry in entries]
    packing = data.packing
    limits = PackingLimits(packing.sequence_length, packing.max_images)
    planner = ValidationPlanner(
        streams,
        [min(most, size) if most else size for size in sizes],
        micro_batch_size=micro_batch_size(config, world_size),
        num_microbatches=num_microbatches(config, world_size),
        data_rank=data_rank,
        data_size=data_size,
        packing=(limits, packing.buffer_size) if packing.enabled else None,
    )
    dataset = MicrobatchDataset(
        streams,
        pad_id=tokenizer.pad_id,
        image_size=config.model.vision.image_size,
        sequence_length=packing.sequence_length if packing.enabled else None,
    )
    return ValidationSet(config, sources, planner, dataset, pin_memory)
