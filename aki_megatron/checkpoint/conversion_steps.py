"""What all conversions share: their settings, reading and writing our checkpoints, and the final logits check."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.adapters import merge_adapters, without_adapters
from aki_megatron.checkpoint.base_weights import NO_BASE_PATHS, BasePaths, open_source
from aki_megatron.checkpoint.conversion_report import (
    STRICT,
    AllowedMismatches,
    ConversionReport,
    TensorMatch,
    TensorRecord,
    match_tensors,
)
from aki_megatron.checkpoint.dcp_io import stored_weights, write_checkpoint
from aki_megatron.checkpoint.hf_folders import PretrainedFolder, stored_vocab_size
from aki_megatron.checkpoint.hf_reference import Reference
from aki_megatron.checkpoint.logits_check import check_logits
from aki_megatron.checkpoint.random_init import RandomInitSource
from aki_megatron.checkpoint.shapes import check_shapes, model_shapes
from aki_megatron.checkpoint.tensors import (
    ProgressSource,
    StoredTensors,
    TensorSource,
    cast,
    merge,
    select,
    total_bytes,
)
from aki_megatron.checkpoint.writers import SHARD_BYTES
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.data import OFFICIAL_IMAGES, SYSTEM_MESSAGE, ImagesConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig
from aki_megatron.config.save import dump_model, load_model
from aki_megatron.data.tokenizer import Vocabulary, grow_tokenizer
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.families.registry import FAMILIES

StartProgress = Callable[[str, int], Callable[[int], None]]
"""Takes a title and a number of bytes; returns a function that takes the bytes of each tensor as it is read."""


@dataclass(frozen=True)
class ConvertedModel:
    """The configuration that belongs to a checkpoint's weights."""

    config: ModelConfig
    attention: AttentionConfig


@dataclass(frozen=True)
class ConversionSettings:
    """Settings of all conversions.

    dtype           precision to write; None keeps each tensor's own
    seed            of tensors that no source holds
    num_files       files of a checkpoint that is written; None writes files of about SHARD_BYTES
    check_logits    compare the logits of both sides in the end
    allowed         exceptions from strict matching
    base_paths      where the bases are of what a checkpoint leaves out
    start_progress  reports progress of long work
    """

    dtype: torch.dtype | None = None
    seed: int = 42
    num_files: int | None = None
    check_logits: bool = True
    allowed: AllowedMismatches = STRICT
    base_paths: BasePaths = NO_BASE_PATHS
    start_progress: StartProgress = lambda _title, _num_bytes: lambda _read: None


def open_checkpoint(
    path: Path, *, merged: bool = True, verify: bool = True, base_paths: BasePaths = NO_BASE_PATHS
) -> tuple[StoredTensors, ConvertedModel]:
    """A checkpoint's weights, and the model they belong to.

    merged      add low-rank adapters to the weights they belong to; false: leave them out
    verify      compare every file with the manifest first, which reads all of them
    base_paths  where the bases are of what the checkpoint leaves out

    Raises CheckpointError when there is none, when it is damaged, or when its tensors are not those of its model.
    """
    source = open_source(path, verify=verify, base_paths=base_paths)
    model = ConvertedModel(*load_model(source.path / files.CONFIG))
    weights = merge_adapters(source, model.config) if merged else without_adapters(source)
    shapes = {name: spec.shape for name, spec in weights.specs.items()}
    check_shapes(shapes, model_shapes(model.config), str(source.path))
    return weights, model


def write_weights(
    folder: Path,
    source: TensorSource,
    model: ConvertedModel,
    settings: ConversionSettings,
    tokenizer: Path | None,
    system_message: str = SYSTEM_MESSAGE,
    images: ImagesConfig = OFFICIAL_IMAGES,
) -> Path:
    """Write ``folder``/step_000000 from a source of all of the model's tensors; return its path."""
    shapes = model_shapes(model.config)
    assert source.specs.keys() == shapes.keys()
    ordered = prepare(select(source, shapes), settings, "writing the checkpoint")
    return write_checkpoint(
        folder,
        0,
        stored_weights(ordered),
        config_yaml=dump_model(model.config, model.attention, system_message, images),
        attach={files.TOKENIZER: tokenizer} if tokenizer else {},
        num_files=settings.num_files or default_num_files(ordered),
    )


def prepare(source: TensorSource, settings: ConversionSettings, title: str) -> TensorSource:
    """The source in the precision of the settings, with its progress reported."""
    converted = source if settings.dtype is None else cast(source, settings.dtype)
    return ProgressSource(converted, settings.start_progress(title, total_bytes(converted)))


def check_vocabulary(config: ModelConfig, vocabulary: Vocabulary, tokenizer: Path) -> None:
    """Raise ConfigError unless the model has as many tokens, and as many added ones, as an extended tokenizer."""
    sizes = (config.decoder.vocab_size, config.decoder.num_added_tokens)
    if sizes != (vocabulary.vocab_size, vocabulary.num_added_tokens):
        raise ConfigError(
            f"The model has vocab_size={sizes[0]} and num_added_tokens={sizes[1]}, the tokenizer {tokenizer} needs "
            f"{vocabulary.vocab_size} and {vocabulary.num_added_tokens}. Give the tokenizer or the model (--model) "
            "that belong together."
        )


def check_chat_tokens(config: DecoderConfig, grown: Path, tokenizer: Path) -> None:
    """Raise ConfigError where an extended tokenizer lacks special tokens of the family's chat format.

    grown  folder of the extended tokenizer; ``tokenizer`` is the one it was made of, for the error
    """
    chat = FAMILIES[config.family].chat
    added = json.loads((grown / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    special = {token["content"] for token in added}
    if missing := [token for token in chat.special_tokens if token not in special]:
        raise ConfigError(
            f"The tokenizer {tokenizer} lacks the special tokens {', '.join(missing)} of the family {config.family}; "
            "give the tokenizer of this language model (--tokenizer)."
        )


def check_tokenizer(model: ModelConfig, tokenizer: Path, grown: Path) -> None:
    """Extend a tokenizer into the folder ``grown`` and compare it with a model.

    Raises ConfigError unless its sizes are the model's and it has the special tokens of the family's chat format;
    DataError where it cannot be read.
    """
    vocabulary = grow_tokenizer(tokenizer, grown)
    check_chat_tokens(model.decoder, grown, tokenizer)
    check_vocabulary(model, vocabulary, tokenizer)


def check_rows(language: Path, config: DecoderConfig, vocabulary: Vocabulary, tokenizer: Path) -> None:
    """Raise ConfigError where a tokenizer has more tokens, but for AKI's, than a language model's tables have rows."""
    rows = stored_vocab_size(language, config)
    # a <pad> that AKI adds is the last token before <image>
    published = vocabulary.vocab_size - (vocabulary.pad_id == vocabulary.vocab_size - 1)
    if published > rows:
        raise ConfigError(
            f"The tokenizer {tokenizer} has {published} tokens, {language} has {rows} rows (vocab_size of its "
            "config.json): the other tokens would be random. Give the tokenizer of this language model (--tokenizer)."
        )


def match_folder(folder: PretrainedFolder, config: ModelConfig, allowed: AllowedMismatches) -> TensorMatch:
    """Match a Hugging Face folder with the model; record tensors that were extended, and those not used."""
    shapes = model_shapes(config)
    match = match_tensors(folder.tensors.specs, folder.table, shapes, source=str(folder.path), allowed=allowed)
    records = [
        replace(record, kind="extended", note=folder.growth_note)
        if set(record.source_names) & set(folder.extended)
        else record
        for record in match.records
    ]
    records += [TensorRecord("skipped", (name,), (), ()) for name in folder.skipped]
    return replace(match, records=tuple(records))


def complete_weights(native: TensorSource, config: ModelConfig, settings: ConversionSettings) -> TensorSource:
    """All tensors of the model: those of ``native``, and random ones for the others."""
    random = RandomInitSource(config, settings.seed)
    return merge(native, select(random, [name for name in random.specs if name not in native.specs]))


def compare_logits(
    report: ConversionReport,
    checkpoint: Path,
    reference: Reference,
    settings: ConversionSettings,
    *,
    merged: bool = True,
) -> None:
    """Compute logits with a checkpoint and with the reference, and add the outcome to the report.

    merged  with its low-rank adapters, if it has any; false: without them

    Raises CheckpointError where they differ.
    """
    if not settings.check_logits:
        report.notes["check"] = "logits not compared (--skip-logits-check)"
        return
    model = load_model(checkpoint / files.CONFIG)[0]
    stored = open_source(checkpoint, verify=False, base_paths=settings.base_paths)
    source = merge_adapters(stored, model) if merged else without_adapters(stored)
    with_progress = ProgressSource(source, settings.start_progress("comparing logits", total_bytes(source)))
    comparison = check_logits(with_progress, model, reference)
    if not comparison.passed:
        raise CheckpointError(
            f"The logits of what was written and of its source differ, and nothing is left of it. {comparison.text()}"
        )
    report.notes["check"] = comparison.text()


def default_num_files(source: TensorSource) -> int:
    """How many files of about SHARD_BYTES a source fills."""
    return math.ceil(total_bytes(source) / SHARD_BYTES)
