"""Conversions between checkpoints and other projects' folders, one tensor in memory at a time, each with a report.

Every function compares names and shapes before it writes, and writes into ``folder``, a staging_dir of the caller.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.adapters import write_adapter
from aki_megatron.checkpoint.base_weights import open_source
from aki_megatron.checkpoint.conversion_report import (
    ConversionReport,
    TensorRecord,
    external_records,
    skipped_records,
)
from aki_megatron.checkpoint.conversion_steps import (
    ConversionSettings,
    ConvertedModel,
    check_chat_tokens,
    check_rows,
    check_tokenizer,
    check_vocabulary,
    compare_logits,
    complete_weights,
    default_num_files,
    match_folder,
    open_checkpoint,
    prepare,
    write_weights,
)
from aki_megatron.checkpoint.dcp_io import WEIGHT, write_checkpoint
from aki_megatron.checkpoint.hf_config import (
    audio_config,
    decoder_config,
    language_config_json,
    read_config_json,
    vision_config,
    vision_config_json,
)
from aki_megatron.checkpoint.hf_export import (
    export,
    export_names,
    exported_images,
    exported_source,
    exported_system_message,
    refuse_audio,
)
from aki_megatron.checkpoint.hf_folders import audio_source, language_source, vision_source
from aki_megatron.checkpoint.hf_reference import Reference
from aki_megatron.checkpoint.official import has_vision_encoder, match_official, official_names, open_official
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.checkpoint.run_text import run_images, run_system_message, run_tokenizer
from aki_megatron.checkpoint.shapes import model_shapes
from aki_megatron.checkpoint.tensors import (
    NameTable,
    ProgressSource,
    TensorSource,
    merge,
    select,
    to_external,
    to_native,
    total_bytes,
)
from aki_megatron.checkpoint.writers import SHARD_BYTES, write_safetensors, write_torch_file
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import AudioConfig, ModelConfig
from aki_megatron.data.tokenizer import Vocabulary, grow_tokenizer
from aki_megatron.errors import CheckpointError, ConfigError

RELEASE_FILE, TRAINING_FILE = "model.safetensors", "checkpoint_0.pt"
"""What to-official writes: the whole model, or the release's training checkpoint, which lacks the vision encoder."""

LONGROPE_NOTE = (
    "the folder chooses short or long factors for each sequence by its own length, as training does; stock "
    "transformers takes those of the longest sequence for the whole batch"
)
"""In the report of to-hf."""

ADAPTER_FOLDER = "adapter"
"""Folder inside that of to-hf that holds the low-rank adapters, where they are not merged."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def from_hf(
    language: Path,
    vision: Path,
    folder: Path,
    settings: ConversionSettings,
    *,
    model: ConvertedModel | None,
    tokenizer: Path,
    audio: Path | None = None,
) -> ConversionReport:
    """Convert the folders of a language model and of SigLIP to a checkpoint; the rest of AKI is randomly initialized.

    model  None takes the sizes from the folders, AKI's resampler and LM head bias, and the attention rule mma
    audio  folder of a Whisper model, whose encoder is taken; None: a model without audio, or with random weights of it
    """
    sources = {"language": str(language), "vision": str(vision), "tokenizer": str(tokenizer)}
    sources |= {"audio": str(audio)} if audio else {}
    report = ConversionReport("from-hf", sources)
    # faults of config.json first: the tokenizer's class reads it too
    decoder_config(language, vocab_size=1, num_added_tokens=0)
    vision_config(vision)
    with TemporaryDirectory() as tokenizer_dir:
        vocabulary = grow_tokenizer(tokenizer, Path(tokenizer_dir))
        model = model or _model_of_folders(language, vision, audio, vocabulary)
        check_chat_tokens(model.config.decoder, Path(tokenizer_dir), tokenizer)
        check_rows(language, model.config.decoder, vocabulary, tokenizer)
        check_vocabulary(model.config, vocabulary, tokenizer)
        folders = [vision_source(vision, model.config.vision), language_source(language, model.config.decoder)]
        if audio:
            folders.append(audio_source(audio, _audio_section(model.config, audio)))
        matches = [match_folder(pretrained, model.config, settings.allowed) for pretrained in folders]
        native = merge(
            *(to_native(pretrained.tensors, match.table) for pretrained, match in zip(folders, matches, strict=True))
        )
        report.records += [record for match in matches for record in match.records]
        known = native.specs.keys() | {name for match in matches for name in match.to_initialize}
        report.records += [
            TensorRecord("initialized", (), (name,), shape)
            for name, shape in model_shapes(model.config).items()
            if name not in known
        ]
        weights = complete_weights(native, model.config, settings)
        checkpoint = write_weights(folder, weights, model, settings, Path(tokenizer_dir))
    table = {native: external for match in matches for native, external in match.table.items()}
    vision_json = read_config_json(vision)
    reference = Reference(
        merge(*(pretrained.tensors for pretrained in folders)),
        table,
        read_config_json(language),
        vision_json.get("vision_config", vision_json),
        read_config_json(audio) if audio else None,
    )
    compare_logits(report, checkpoint, reference, settings)
    return report


def from_export(
    exported: Path, folder: Path, settings: ConversionSettings, *, tokenizer: Path | None = None
) -> ConversionReport:
    """Convert a folder that ``to_hf`` wrote to a checkpoint.

    tokenizer  None takes the folder's own, if it has one
    """
    opened = exported_source(exported, settings.allowed)
    report = ConversionReport("from-hf", {"aki": str(exported)}, list(opened.match.records))
    model = ConvertedModel(opened.config, AttentionConfig.model_validate({"rule": opened.rule}))
    weights = complete_weights(opened.source, opened.config, settings)
    with TemporaryDirectory() as tokenizer_dir, TemporaryDirectory() as grown:
        # without the folder's config.json, because of which transformers would offer to run the folder's own code
        tokenizer_files = [path for name in TOKENIZER_FILES if (path := (tokenizer or exported) / name).is_file()]
        for path in tokenizer_files:
            shutil.copy(path, tokenizer_dir)
        if tokenizer_files or tokenizer:
            check_tokenizer(opened.config, tokenizer or Path(tokenizer_dir), Path(grown))
        kept = Path(tokenizer_dir) if tokenizer_files else None
        message, images = exported_system_message(exported), exported_images(exported)
        checkpoint = write_weights(folder, weights, model, settings, kept, message, images)
    compare_logits(report, checkpoint, _exported_reference(exported, opened.match.table), settings)
    return report


def to_hf(
    checkpoint: Path,
    folder: Path,
    settings: ConversionSettings,
    *,
    tokenizer: Path | None,
    shard_bytes: int = SHARD_BYTES,
    adapter: bool = False,
) -> ConversionReport:
    """Convert a checkpoint to a folder that plain transformers loads.

    tokenizer  None takes the one that the checkpoint holds, or the one its run was trained with
    adapter    write low-rank adapters into the folder ADAPTER_FOLDER inside, as peft loads them onto the rest; false:
               merge them into the weights
    """
    source, model = open_checkpoint(checkpoint, merged=not adapter, base_paths=settings.base_paths)
    refuse_audio(model.config)
    tokenizer = tokenizer or run_tokenizer(source.path)
    with TemporaryDirectory() as grown:
        check_tokenizer(model.config, tokenizer, Path(grown))
    table = export_names(model.config)
    report = ConversionReport("to-hf", _published_source(source.path), external_records(source, table))
    if model.config.decoder.rope.rope_type == "longrope":
        report.notes["longrope"] = LONGROPE_NOTE
    with_progress = ProgressSource(source, settings.start_progress("writing the folder", total_bytes(source)))
    export(
        with_progress,
        model.config,
        model.attention,
        tokenizer,
        folder,
        settings.dtype,
        shard_bytes=shard_bytes,
        system_message=run_system_message(source.path),
        images=run_images(source.path),
    )
    if adapter:
        stored = open_source(source.path, verify=False, base_paths=settings.base_paths)
        write_adapter(stored, model.config, folder / ADAPTER_FOLDER, settings.dtype)
        report.notes["adapter"] = f"low-rank adapters in {ADAPTER_FOLDER}, not merged into the weights"
    compare_logits(report, source.path, _exported_reference(folder, table), settings, merged=not adapter)
    return report


def from_official(
    release: Path,
    folder: Path,
    model: ConvertedModel,
    settings: ConversionSettings,
    *,
    vision: Path | None,
    tokenizer: Path | None,
) -> ConversionReport:
    """Convert the official release to a checkpoint: its safetensors, or a ``.pt`` and the SigLIP folder ``vision``.

    tokenizer  None takes the one beside the release, if there is one
    """
    official = open_official(release)
    if has_vision_encoder(official) == (vision is not None):
        raise CheckpointError(
            f"{release} holds the vision encoder; leave --vision out."
            if vision
            else f"{release} holds no vision encoder, as the release's training checkpoints: give SigLIP's folder as "
            "--vision."
        )
    match = match_official(official, model.config, settings.allowed)
    report = ConversionReport("from-official", {"release": str(release)}, list(match.records))
    external = merge(official)
    native, table = to_native(external, match.table), dict(match.table)
    if vision:
        encoder = vision_source(vision, model.config.vision)
        encoder_match = match_folder(encoder, model.config, settings.allowed)
        report.records += encoder_match.records
        native = merge(native, to_native(encoder.tensors, encoder_match.table))
        table |= encoder_match.table
        external = merge(external, encoder.tensors)
    beside = release if release.is_dir() else release.parent
    tokenizer = tokenizer or (beside if (beside / "tokenizer.json").is_file() else None)
    with TemporaryDirectory() as tokenizer_dir:
        if tokenizer:
            check_tokenizer(model.config, tokenizer, Path(tokenizer_dir))
        weights = complete_weights(native, model.config, settings)
        checkpoint = write_weights(folder, weights, model, settings, Path(tokenizer_dir) if tokenizer else None)
    compare_logits(report, checkpoint, _stock_reference(external, table, model.config), settings)
    return report


def to_official(checkpoint: Path, folder: Path, settings: ConversionSettings, *, training: bool) -> ConversionReport:
    """Convert a checkpoint to the official release's file; with ``training`` to its training checkpoint."""
    source, model = open_checkpoint(checkpoint, base_paths=settings.base_paths)
    refuse_audio(model.config)
    table = official_names(model.config, vision=not training)
    report = ConversionReport("to-official", _published_source(source.path), external_records(source, table))
    report.records += skipped_records(source, sorted(source.specs.keys() - table.keys()))
    external = to_external(source, table, model.config.decoder)
    prepared = prepare(external, settings, "writing the release's tensors")
    if training:
        write_torch_file(folder / TRAINING_FILE, prepared, {"epoch": 0, "step": None})
    else:
        write_safetensors(folder / RELEASE_FILE, prepared)
    written = open_official(folder / (TRAINING_FILE if training else RELEASE_FILE))
    compare_logits(report, source.path, _stock_reference(written, table, model.config), settings)
    return report


def reshard(checkpoint: Path, folder: Path, settings: ConversionSettings, *, weights_only: bool) -> ConversionReport:
    """Rewrite a checkpoint bit for bit in another number of files; with ``weights_only`` without optimizer state.

    What the checkpoint leaves out is read from its base and written too.
    """
    source = open_source(checkpoint, optimizer_state=True, base_paths=settings.base_paths)
    kept = [name for name in source.specs if not weights_only or name.startswith(WEIGHT)]
    report = ConversionReport("reshard", {"checkpoint": str(source.path)})
    report.records += external_records(source, {name: (name,) for name in kept})
    report.records += skipped_records(source, [name for name in source.specs if name not in kept])
    tensors = select(source, kept)
    write_checkpoint(
        folder,
        files.step_of(source.path),
        prepare(tensors, settings, "writing the checkpoint"),
        config_yaml=(source.path / files.CONFIG).read_text(encoding="utf-8"),
        attach=source.other_files(),
        num_files=settings.num_files or default_num_files(tensors),
    )
    return report


def _published_source(checkpoint: Path) -> dict[str, str]:
    """Name a checkpoint in a folder that may be published: by its content, without a path of this machine."""
    digest = files.file_digest(checkpoint / files.MANIFEST)["sha256"]
    return {"checkpoint": checkpoint.name, f"sha256 of its {files.MANIFEST}": digest}


def _model_of_folders(language: Path, vision: Path, audio: Path | None, vocabulary: Vocabulary) -> ConvertedModel:
    decoder = decoder_config(language, vocab_size=vocabulary.vocab_size, num_added_tokens=vocabulary.num_added_tokens)
    hears = audio_config(audio) if audio else None
    config = ModelConfig(vision=vision_config(vision), audio=hears, decoder=decoder)
    return ConvertedModel(config, AttentionConfig(rule="mma"))


def _audio_section(config: ModelConfig, folder: Path) -> AudioConfig:
    if config.audio is None:
        raise ConfigError(f"The model (--model) has no audio encoder, model.audio is null; leave --audio {folder} out.")
    return config.audio


def _stock_reference(source: TensorSource, table: NameTable, config: ModelConfig) -> Reference:
    return Reference(source, table, language_config_json(config.decoder), vision_config_json(config.vision))


def _exported_reference(folder: Path, table: NameTable) -> Reference:
    config_json = read_config_json(folder)
    return Reference(open_safetensors(folder), table, config_json["text_config"], config_json["vision_config"])
