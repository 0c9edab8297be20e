"""Conversions between other people's folders and our checkpoints, tensor by tensor, and the report of each.

Every function writes into ``folder``, which nobody reads yet (sinks.aside), and compares names and shapes before it
writes anything.
"""

import shutil
from collections.abc import Set
from pathlib import Path
from tempfile import TemporaryDirectory

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.conversion_report import Report, Row
from aki_megatron.checkpoint.conversion_steps import (
    TOKENIZER,
    Model,
    Settings,
    check_vocabulary,
    compare_logits,
    file_count,
    match_folder,
    open_ours,
    prepared,
    rows_out,
    total_bytes,
    with_drawn,
    write_ours,
)
from aki_megatron.checkpoint.dcp_io import WEIGHT, CheckpointSource, write_checkpoint
from aki_megatron.checkpoint.hf_config import (
    decoder_config,
    describe_language,
    describe_vision,
    read_description,
    vision_config,
)
from aki_megatron.checkpoint.hf_export import export, export_names, exported_source
from aki_megatron.checkpoint.hf_folders import language_source, vision_source
from aki_megatron.checkpoint.hf_reference import Reference
from aki_megatron.checkpoint.official import has_encoder, match_official, official_names, open_official
from aki_megatron.checkpoint.readers import ProgressSource, merged, only, open_safetensors
from aki_megatron.checkpoint.tensors import NameTable, TensorSource, to_external, to_native
from aki_megatron.checkpoint.weight_names import model_shapes
from aki_megatron.checkpoint.writers import SHARD_BYTES, write_safetensors, write_torch_file
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.run import AttentionConfig
from aki_megatron.config.yaml_file import read_yaml
from aki_megatron.data.tokenizer import Vocabulary, grow_tokenizer
from aki_megatron.errors import CheckpointError

RELEASE_FILE, TRAINING_FILE = "model.safetensors", "checkpoint_0.pt"
"""What to-official writes: the whole model, or the form of the release's training checkpoints, without the encoder."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def from_hf(
    language: Path, vision: Path, folder: Path, settings: Settings, *, model: Model | None, tokenizer: Path
) -> Report:
    """A checkpoint from the folders of a language model and of SigLIP: the rest of AKI is drawn.

    model  None: the sizes that the folders say, AKI's resampler and head bias, the mask rule mma
    """
    report = Report("from-hf", {"language": str(language), "vision": str(vision), "tokenizer": str(tokenizer)})
    with TemporaryDirectory() as grown:
        vocabulary = grow_tokenizer(tokenizer, Path(grown))
        model = model or _model_of(language, vision, vocabulary)
        check_vocabulary(model.config, vocabulary, tokenizer)
        parts = [vision_source(vision, model.config.vision), language_source(language, model.config.decoder)]
        matches = [match_folder(part, model.config, settings.allowed) for part in parts]
        report.rows += [row for found in matches for row in found.rows]
        ours = merged(*(to_native(part.tensors, found.table) for part, found in zip(parts, matches, strict=True)))
        report.rows += _rows_drawn(
            model.config, ours.facts.keys() | {name for found in matches for name in found.drawn}
        )
        written = write_ours(folder, with_drawn(ours, model.config, settings), model, settings, Path(grown))
    names = {ours: theirs for found in matches for ours, theirs in found.table.items()}
    described = read_description(vision)
    reference = Reference(
        merged(*(part.tensors for part in parts)),
        names,
        read_description(language),
        described.get("vision_config", described),
    )
    compare_logits(report, written, reference, settings)
    return report


def from_export(export: Path, folder: Path, settings: Settings) -> Report:
    """A checkpoint from a folder that to_hf wrote."""
    read = exported_source(export, settings.allowed)
    report = Report("from-hf", {"aki": str(export)}, list(read.match.rows))
    model = Model(read.config, AttentionConfig.model_validate({"rule": read.rule}))
    whole = with_drawn(read.source, read.config, settings)
    with TemporaryDirectory() as alone:
        # without the folder's config.json, which would have transformers ask whether to run the folder's own code
        found = [path for name in TOKENIZER_FILES if (path := export / name).is_file()]
        for path in found:
            shutil.copy(path, alone)
        written = write_ours(folder, whole, model, settings, Path(alone) if found else None)
    compare_logits(report, written, _reference_of_export(export, read.match.table), settings)
    return report


def to_hf(
    checkpoint: Path, folder: Path, settings: Settings, *, tokenizer: Path | None, shard_bytes: int = SHARD_BYTES
) -> Report:
    """A folder that plain transformers loads, from a checkpoint.

    tokenizer  None: the one the checkpoint holds, or the one its run was trained with
    """
    source, model = open_ours(checkpoint)
    tokenizer = tokenizer or _tokenizer_of(source.path)
    report = Report("to-hf", {"checkpoint": str(source.path), "tokenizer": str(tokenizer)})
    watched = ProgressSource(source, settings.watch("writing the folder", total_bytes(source)))
    report.rows = export(
        watched, model.config, model.attention.rule, tokenizer, folder, settings.dtype, shard_bytes=shard_bytes
    )
    compare_logits(report, source.path, _reference_of_export(folder, export_names(model.config)), settings)
    return report


def from_official(
    release: Path, folder: Path, model: Model, settings: Settings, *, vision: Path | None, tokenizer: Path | None
) -> Report:
    """A checkpoint from the official release: its safetensors, or a ``.pt`` and the SigLIP folder ``vision``.

    tokenizer  None: the one beside the release, if there is one
    """
    source = open_official(release)
    if has_encoder(source) == (vision is not None):
        raise CheckpointError(
            f"{release} holds the encoder; leave --vision out."
            if vision
            else f"{release} holds no encoder, as the release's training checkpoints: give SigLIP's folder as --vision."
        )
    found = match_official(source, model.config, settings.allowed)
    report = Report("from-official", {"release": str(release)}, list(found.rows))
    ours, names, theirs = to_native(source, found.table), dict(found.table), merged(source)
    if vision:
        encoder = vision_source(vision, model.config.vision)
        of_encoder = match_folder(encoder, model.config, settings.allowed)
        report.rows += of_encoder.rows
        ours = merged(ours, to_native(encoder.tensors, of_encoder.table))
        names |= of_encoder.table
        theirs = merged(source, encoder.tensors)
    beside = release if release.is_dir() else release.parent
    tokenizer = tokenizer or (beside if (beside / "tokenizer.json").is_file() else None)
    with TemporaryDirectory() as grown:
        if tokenizer:
            check_vocabulary(model.config, grow_tokenizer(tokenizer, Path(grown)), tokenizer)
        whole = with_drawn(ours, model.config, settings)
        written = write_ours(folder, whole, model, settings, Path(grown) if tokenizer else None)
    compare_logits(report, written, _reference(theirs, names, model.config), settings)
    return report


def to_official(checkpoint: Path, folder: Path, settings: Settings, *, training: bool) -> Report:
    """The release's file from a checkpoint; with ``training`` in the form of its training checkpoints."""
    source, model = open_ours(checkpoint)
    table = official_names(model.config, vision=not training)
    report = Report("to-official", {"checkpoint": str(source.path)}, rows_out(table, source))
    encoder = sorted(source.facts.keys() - table.keys())
    report.rows += [Row("left out", (name,), (), source.facts[name].shape) for name in encoder]
    theirs = prepared(to_external(source, table, model.config.decoder), settings, "writing the release's tensors")
    if training:
        write_torch_file(folder / TRAINING_FILE, theirs, {"epoch": 0, "step": None})
    else:
        write_safetensors(folder / RELEASE_FILE, theirs)
    written = open_official(folder / (TRAINING_FILE if training else RELEASE_FILE))
    compare_logits(report, source.path, _reference(written, table, model.config), settings)
    return report


def reshard(checkpoint: Path, folder: Path, settings: Settings, *, weights_only: bool) -> Report:
    """The same checkpoint, bit for bit, in another number of files; optionally without the optimizer's moments."""
    source = CheckpointSource(checkpoint, moments=True)
    kept = [name for name in source.facts if not weights_only or name.startswith(WEIGHT)]
    wanted = only(source, kept)
    rows = [Row("mapped", (name,), (name,), source.facts[name].shape) for name in kept]
    rows += [Row("left out", (name,), (), fact.shape) for name, fact in source.facts.items() if name not in kept]
    report = Report("reshard", {"checkpoint": str(source.path)}, rows)
    own = (files.MANIFEST, files.INDEX, files.CONFIG)
    others = [name for name in files.read_manifest(source.path) if name not in own and not name.endswith(".distcp")]
    write_checkpoint(
        folder,
        files.step_of(source.path),
        prepared(wanted, settings, "writing the checkpoint"),
        config_yaml=(source.path / files.CONFIG).read_text(encoding="utf-8"),
        attach={name: source.path / name for name in others},
        files=settings.files or file_count(wanted),
    )
    return report


def _model_of(language: Path, vision: Path, vocabulary: Vocabulary) -> Model:
    decoder = decoder_config(language, vocab_size=vocabulary.vocab_size, num_added_tokens=vocabulary.num_added_tokens)
    return Model(ModelConfig(vision=vision_config(vision), decoder=decoder), AttentionConfig(rule="mma"))


def _rows_drawn(config: ModelConfig, known: Set[str]) -> list[Row]:
    shapes = model_shapes(config)
    return [Row("drawn", (), (name,), shape) for name, shape in shapes.items() if name not in known]


def _tokenizer_of(checkpoint: Path) -> Path | None:
    """The tokenizer that a checkpoint holds, or that its run read."""
    if (checkpoint / TOKENIZER).is_dir():
        return checkpoint / TOKENIZER
    named = read_yaml(checkpoint / files.CONFIG).values.get("data", {}).get("tokenizer")
    return Path(named) if named and Path(named).is_dir() else None


def _reference(source: TensorSource, table: NameTable, config: ModelConfig) -> Reference:
    return Reference(source, table, describe_language(config.decoder), describe_vision(config.vision))


def _reference_of_export(folder: Path, table: NameTable) -> Reference:
    described = read_description(folder)
    return Reference(open_safetensors(folder), table, described["text_config"], described["vision_config"])
