"""Construct what validates a run while it trains."""

import hashlib
import json
from collections.abc import Callable
from functools import partial

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.config.batch_sizes import micro_batch_size, num_microbatches
from aki_megatron.config.run import RunConfig
from aki_megatron.data.media import media_decoders
from aki_megatron.data.pipeline import build_template, image_options
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.data.validation_set import ValidationSet, build_validation_set, validation_sources
from aki_megatron.engine.base import Engine
from aki_megatron.evaluate.staged_generation import GenerationSettings
from aki_megatron.parallel.topology import Topology
from aki_megatron.train.best_checkpoint import BestCheckpoint
from aki_megatron.train.validation import Validator
from aki_megatron.train.validation_answers import ValidationQuestions
from aki_megatron.types import ControlRequest


def open_validation_set(
    config: RunConfig, tokenizer: Tokenizer, topology: Topology, progress: Callable[[str], None]
) -> ValidationSet | None:
    """Open what this rank validates on; None without validation, and on ranks that read no data."""
    if config.validation.interval == 0 or not topology.reads_data:
        return None
    return build_validation_set(
        config,
        tokenizer,
        world_size=topology.world_size,
        data_rank=topology.data_rank,
        data_size=topology.data,
        pin_memory=topology.device.type == "cuda",
        progress=progress,
    )


def build_validator(
    config: RunConfig,
    engine: Engine,
    tokenizer: Tokenizer,
    topology: Topology,
    validation_set: ValidationSet | None,
    checkpointer: Checkpointer,
    poll_control: Callable[[], ControlRequest],
    set_phase: Callable[[str], None],
) -> Validator | None:
    """Build the validation of a run, None where it has none.

    validation_set           of open_validation_set
    poll_control, set_phase  see Validator
    """
    validation = config.validation
    if validation.interval == 0:
        return None
    names = [entry.name for entry in validation_sources(config)]
    best = None
    if validation.keep_best and topology.rank == 0:
        best = BestCheckpoint(checkpointer.has_checkpoint, partial(files.name_best, checkpointer.folder))
    return Validator(
        engine,
        names,
        interval=validation.interval,
        steps=config.train.steps,
        at_start=validation.at_start,
        validation_set=validation_set,
        questions=build_questions(config, names, tokenizer, topology, validation_set) if validation.generate else None,
        best=best,
        settings=settings_digest(config),
        sum_over_world=topology.sum_over_world,
        poll_control=poll_control,
        set_phase=set_phase,
    )


def build_questions(
    config: RunConfig,
    names: list[str],
    tokenizer: Tokenizer,
    topology: Topology,
    validation_set: ValidationSet | None,
) -> ValidationQuestions:
    """Build the questions of this rank; their prompts are packed where samples are."""
    packing = config.data.packing
    settings = GenerationSettings(
        num_microbatches=num_microbatches(config, topology.world_size),
        micro_batch_size=micro_batch_size(config, topology.world_size),
        pad_id=tokenizer.pad_id,
        image_size=config.model.vision.image_size,
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=config.validation.max_new_tokens,
        max_positions=packing.sequence_length if packing.enabled else 0,
        max_images=packing.max_images if packing.enabled else 0,
    )
    return ValidationQuestions(
        names,
        settings,
        validation_set=validation_set,
        template=build_template(config, tokenizer),
        decoders=media_decoders(config.model, image_options(config.data)),
        data_rank=topology.data_rank,
        data_size=topology.data,
        max_prompt_positions=config.model.decoder.rope.max_position_embeddings - config.validation.max_new_tokens,
    )


def settings_digest(config: RunConfig) -> str:
    """Return a digest of what is validated on: losses are compared only where it is the same."""
    entries = [entry.model_dump(mode="json") for entry in validation_sources(config)]
    for entry in entries:
        entry.pop("weight", None)  # each source counts by its tokens
    chosen = [entries, config.validation.split, config.validation.samples]
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
