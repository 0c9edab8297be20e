"""What all conversions share: the model, the settings, our checkpoints read and written, and the last check."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.conversion_report import STRICT, Allowed, Match, Report, Row, match
from aki_megatron.checkpoint.dcp_io import CheckpointSource, as_stored, write_checkpoint
from aki_megatron.checkpoint.hf_folders import PretrainedFolder
from aki_megatron.checkpoint.hf_reference import Reference
from aki_megatron.checkpoint.logits_check import check_logits
from aki_megatron.checkpoint.random_init import Drawn
from aki_megatron.checkpoint.readers import ProgressSource, cast, merged, only
from aki_megatron.checkpoint.tensors import NameTable, TensorSource
from aki_megatron.checkpoint.weight_names import model_shapes
from aki_megatron.checkpoint.writers import SHARD_BYTES
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.run import AttentionConfig
from aki_megatron.config.save import dump_model, load_model
from aki_megatron.data.tokenizer import Vocabulary
from aki_megatron.errors import CheckpointError, ConfigError

TOKENIZER = "tokenizer"
"""Folder inside a converted checkpoint."""

Watch = Callable[[str, int], Callable[[int], None]]
"""Told what is written and how many bytes it has; returns what to tell the bytes of each tensor."""


@dataclass(frozen=True)
class Model:
    """What gives weights a meaning."""

    config: ModelConfig
    attention: AttentionConfig


@dataclass(frozen=True)
class Settings:
    """What all conversions share; ``dtype`` None keeps each tensor's own."""

    dtype: torch.dtype | None = None
    seed: int = 42
    files: int | None = None
    check: bool = True
    allowed: Allowed = STRICT
    watch: Watch = lambda _title, _bytes: lambda _read: None


def open_ours(checkpoint: Path) -> tuple[CheckpointSource, Model]:
    """A checkpoint's weights and the model they are of.

    Errors: CheckpointError when it is none, is damaged, or its tensors are not those of the model it names.
    """
    source = CheckpointSource(checkpoint)
    model = Model(*load_model(source.path / files.CONFIG))
    shapes = model_shapes(model.config)
    match(source.facts, {name: (name,) for name in shapes}, shapes, source=str(source.path), allowed=STRICT)
    return source, model


def write_ours(folder: Path, source: TensorSource, model: Model, settings: Settings, tokenizer: Path | None) -> Path:
    """Write step_000000 from a source of all of the model's tensors."""
    shapes = model_shapes(model.config)
    assert source.facts.keys() == shapes.keys()
    ordered = prepared(only(source, shapes), settings, "writing the checkpoint")
    return write_checkpoint(
        folder,
        0,
        as_stored(ordered),
        config_yaml=dump_model(model.config, model.attention),
        attach={TOKENIZER: tokenizer} if tokenizer else {},
        files=settings.files or file_count(ordered),
    )


def prepared(source: TensorSource, settings: Settings, title: str) -> TensorSource:
    """In the precision that was asked for, and watched."""
    wanted = source if settings.dtype is None else cast(source, settings.dtype)
    return ProgressSource(wanted, settings.watch(title, total_bytes(wanted)))


def rows_out(table: NameTable, ours: TensorSource) -> list[Row]:
    """Rows of a conversion of our tensors to theirs."""
    return [
        Row("mapped" if len(theirs) == 1 else "cut", (name,), tuple(theirs), ours.facts[name].shape)
        for name, theirs in table.items()
    ]


def check_vocabulary(config: ModelConfig, vocabulary: Vocabulary, tokenizer: Path) -> None:
    """ConfigError unless the model has a row for each token of a grown tokenizer, and its added ones last."""
    sizes = (config.decoder.vocab_size, config.decoder.num_added_tokens)
    if sizes != (vocabulary.vocab_size, vocabulary.num_added_tokens):
        raise ConfigError(
            f"The model has vocab_size={sizes[0]} and num_added_tokens={sizes[1]}, the tokenizer {tokenizer} needs "
            f"{vocabulary.vocab_size} and {vocabulary.num_added_tokens}. Give the tokenizer or the model (--model) that "
            "belong together."
        )


def match_folder(folder: PretrainedFolder, config: ModelConfig, allowed: Allowed) -> Match:
    """Compare a Hugging Face folder with the model, strictly; tables that grew are said to have grown."""
    shapes = model_shapes(config)
    found = match(folder.tensors.facts, folder.table, shapes, source=str(folder.path), allowed=allowed)
    rows = [replace(row, kind="grown") if set(row.read) & set(folder.grown) else row for row in found.rows]
    rows += [Row("left out", (name,), (), ()) for name in folder.left_out]
    return replace(found, rows=tuple(rows))


def with_drawn(ours: TensorSource, config: ModelConfig, settings: Settings) -> TensorSource:
    """All tensors of the model: what is not there is drawn."""
    drawn = Drawn(config, settings.seed)
    return merged(ours, only(drawn, [name for name in drawn.facts if name not in ours.facts]))


def compare_logits(report: Report, written: Path, reference: Reference, settings: Settings) -> None:
    """Compute with what was written and with the other side; CheckpointError where they differ."""
    if not settings.check:
        report.facts["check"] = "logits not compared (--skip-logits-check)"
        return
    ours = CheckpointSource(written, checked=False)
    watched = ProgressSource(ours, settings.watch("comparing logits", total_bytes(ours)))
    found = check_logits(watched, load_model(written / files.CONFIG)[0], reference)
    if not found.passed:
        raise CheckpointError(
            f"The logits of what was written and of its source differ, and nothing is left of it. {found.text()}"
        )
    report.facts["check"] = found.text()


def file_count(source: TensorSource) -> int:
    """Files of about SHARD_BYTES each."""
    return math.ceil(total_bytes(source) / SHARD_BYTES)


def total_bytes(source: TensorSource) -> int:
    """Size of all tensors of a source."""
    return sum(fact.bytes for fact in source.facts.values())
