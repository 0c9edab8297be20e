"""Hugging Face folders of SigLIP, Whisper and language models: opened for reading, and written.

Strict: config.json must agree with the run's model section, and every tensor must be there with the right shape; errors
list every difference. Only safetensors are read, never a pickle.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from aki_megatron.checkpoint.hf_config import (
    check_audio_config,
    check_decoder_config,
    check_vision_config,
    read_config_json,
    vision_config_json,
)
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.checkpoint.shapes import check_shapes
from aki_megatron.checkpoint.tensors import LazyTensors, NameTable, TensorSource, TensorSpec, to_external
from aki_megatron.checkpoint.weight_names import audio_names, is_buffer, language_names, vision_names
from aki_megatron.config.model import AudioConfig, DecoderConfig, ModelConfig, VisionConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.init import seeded
from aki_megatron.model.stage import EMBEDDING_STD
from aki_megatron.model.vision import VisionEncoder


@dataclass(frozen=True)
class PretrainedFolder:
    """A Hugging Face folder's tensors under their external names."""

    path: Path
    tensors: TensorSource
    """What the model uses of the folder; the token embedding and the LM head have padded_vocab_size rows."""
    table: NameTable
    """Native name -> external names."""
    skipped: tuple[str, ...] = ()
    """Tensors of the folder that the model does not use."""
    extended: tuple[str, ...] = ()
    """Tensors that have fewer than padded_vocab_size rows in the folder; the rows after those are random."""
    growth_note: str = ""
    """From how many rows to how many they are extended."""


def language_source(folder: Path, config: DecoderConfig) -> PretrainedFolder:
    """Open a language model's folder.

    A token embedding or LM head with too few rows is extended by rows from N(0, EMBEDDING_STD), the same every time.

    Raises ConfigError where config.json describes another model; CheckpointError where the weights cannot be read, or
    where tied embeddings are stored twice and differ.
    """
    check_decoder_config(folder, config)
    stored = open_safetensors(folder)
    weights = FAMILIES[config.family].weights
    embedding, lm_head = weights.base_model_prefix + weights.embedding, weights.lm_head
    skipped: tuple[str, ...] = ()
    if config.tie_word_embeddings and lm_head in stored.specs:
        # some published folders store the tied tensor twice
        if embedding in stored.specs and not torch.equal(stored.get(lm_head), stored.get(embedding)):
            raise CheckpointError(
                f"{folder}: config.json says tie_word_embeddings=True, but {lm_head} and {embedding} differ; "
                "correct config.json."
            )
        skipped = (lm_head,)
    skipped += tuple(name for name in stored.specs if is_buffer(name))
    specs = {name: spec for name, spec in stored.specs.items() if name not in skipped}
    _check_rows(folder, config, {name: specs[name] for name in (embedding, lm_head) if name in specs})
    rows = config.padded_vocab_size
    extended = {
        name: TensorSpec((rows, *specs[name].shape[1:]), specs[name].dtype)
        for name in (embedding, lm_head)
        if name in specs and specs[name].shape and specs[name].shape[0] < rows
    }

    def getter(name: str) -> Callable[[], Tensor]:
        return lambda: _extend_rows(stored.get(name), name, rows) if name in extended else stored.get(name)

    growth = f"from {stored_vocab_size(folder, config)} to {rows} rows"
    tensors = LazyTensors({**specs, **extended}, {name: getter(name) for name in specs})
    return PretrainedFolder(folder, tensors, language_names(config), skipped, tuple(extended), growth)


def stored_vocab_size(folder: Path, config: DecoderConfig) -> int:
    """Return the rows that config.json gives to the token embedding and the LM head."""
    config_json, family = read_config_json(folder), FAMILIES[config.family].config
    key = family.field_keys["padded_vocab_size"]
    return int({**family.defaults, **config_json.get("text_config", config_json)}[key])


def _check_rows(folder: Path, config: DecoderConfig, tables: Mapping[str, TensorSpec]) -> None:
    """Raise CheckpointError where rows of other tokens than AKI's would be random."""
    rows = stored_vocab_size(folder, config)
    if config.vocab_size > rows + 1:  # a <pad> that AKI adds is a token of the tables, too
        raise CheckpointError(
            f"{folder} has {rows} rows, the model has vocab_size={config.vocab_size} tokens besides AKI's: the rows of "
            "the others would be random. Give the tokenizer and the sizes that belong to this language model."
        )
    if found := [f"{name} has {spec.shape[0]}" for name, spec in tables.items() if spec.shape[:1] != (rows,)]:
        raise CheckpointError(
            f"{folder}: config.json says vocab_size={rows} rows, but {' and '.join(found)}: one of several "
            "tensor-parallel slices, or another model's config.json. Give the whole tables."
        )


def vision_source(folder: Path, config: VisionConfig) -> PretrainedFolder:
    """Open a SigLIP folder, a whole SigLIP or its vision part alone.

    Raises ConfigError where config.json describes another encoder; CheckpointError where the weights cannot be read.
    """
    check_vision_config(folder, config)
    stored = open_safetensors(folder)
    # published folders and older transformers write the prefix, transformers 5 leaves it out of vision-only folders
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in stored.specs) else ""
    # the text tower of a whole SigLIP is not used, nor is the pooling head where the configuration leaves it out
    skipped: tuple[str, ...] = ("text_model.", "logit_scale", "logit_bias") if prefix else ()
    skipped += () if config.pooling_head else (f"{prefix}head.",)
    specs = {name: spec for name, spec in stored.specs.items() if not name.startswith(skipped) and not is_buffer(name)}
    tensors = LazyTensors(specs, {name: lambda name=name: stored.get(name) for name in specs})  # type: ignore[misc]
    return PretrainedFolder(
        folder, tensors, vision_names(config, prefix), tuple(name for name in stored.specs if name not in specs)
    )


def audio_source(folder: Path, config: AudioConfig) -> PretrainedFolder:
    """Open the encoder of a Whisper folder: of a WhisperForConditionalGeneration, a WhisperModel, or the encoder alone.

    Raises ConfigError where config.json describes another encoder; CheckpointError where the weights cannot be read.
    """
    check_audio_config(folder, config)
    stored = open_safetensors(folder)
    prefix = next(prefix for prefix in ("model.encoder.", "encoder.", "")
                  if any(name.startswith(prefix) for name in stored.specs) or not prefix)  # fmt: skip
    specs = {name: spec for name, spec in stored.specs.items() if name.startswith(prefix)}
    tensors = LazyTensors(specs, {name: lambda name=name: stored.get(name) for name in specs})  # type: ignore[misc]
    skipped = tuple(name for name in stored.specs if name not in specs)  # the decoder
    return PretrainedFolder(folder, tensors, audio_names(config, prefix), skipped)


def check_folder(folder: PretrainedFolder, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a folder's tensors with those that the model needs of it.

    shapes  shape of every tensor of the model by native name

    Raises CheckpointError with every tensor that is missing, unexpected, or of another shape.
    """
    specs = folder.tensors.specs
    used = [name for names in folder.table.values() for name in names if name in specs]
    if whole := [name for name in used if not specs[name].dtype.is_floating_point]:
        raise CheckpointError(f"{folder.path}: {', '.join(whole)} hold whole numbers, no weights; fetch it again.")
    native = LazyTensors({name: TensorSpec(shapes[name], torch.float32) for name in folder.table}, {})
    expected = {name: spec.shape for name, spec in to_external(native, folder.table, config.decoder).specs.items()}
    check_shapes({name: spec.shape for name, spec in folder.tensors.specs.items()}, expected, str(folder.path))


def save_vision(encoder: VisionEncoder, config: VisionConfig, folder: Path) -> None:
    """Write an encoder as a Hugging Face folder of a SiglipVisionModel: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"input_embedder.vision_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    tensors = {
        external: state[native].detach().contiguous().cpu()
        for native, (external,) in vision_names(config, "vision_model.").items()
    }
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(vision_config_json(config), indent=2, sort_keys=True) + "\n")


def _extend_rows(tensor: Tensor, name: str, rows: int) -> Tensor:
    """A tensor [rows of the folder, D] with random rows appended up to ``rows``."""
    with seeded(0, f"grown.{name}"):
        added = torch.randn(rows - len(tensor), tensor.shape[1]) * EMBEDDING_STD
    return torch.cat([tensor, added.to(tensor.dtype)])
