"""Load a trained model with all that its prompts need: from a run folder, a checkpoint, or a folder of to-hf."""

from dataclasses import dataclass
from pathlib import Path

import torch

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.hf_export import exported_images, exported_source, exported_system_message
from aki_megatron.checkpoint.initial_weights import open_weights
from aki_megatron.checkpoint.logits_check import stage_from_tensors
from aki_megatron.checkpoint.run_text import run_images, run_system_message, run_tokenizer
from aki_megatron.checkpoint.tensors import TensorSource
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.data import ImagesConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.save import load_model
from aki_megatron.data.image import ImageOptions
from aki_megatron.data.media import num_media_tokens
from aki_megatron.data.template import MIN_TEXT_TOKENS, Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import CheckpointError
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import Stage, tie_weights

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Name -> precision in which a model answers."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that answers.

    path      the checkpoint or the folder that it was read from
    template  renders conversations as in training, with the run's system message
    images    how images become pixels, as in training
    """

    path: Path
    stage: Stage
    template: Template
    images: ImageOptions


def default_device() -> str:
    """Return the device that is taken if none is named: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_for_answering(
    path: Path, *, tokenizer: Path | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LoadedModel:
    """Load a model, ready to answer.

    path       a run folder or a folder of checkpoints (the newest is taken), one checkpoint, or a folder of to-hf
    tokenizer  folder of the tokenizer, where the checkpoint has none
    device     where the model is put
    dtype      precision of its weights

    Raises CheckpointError where there is no such model, where it is damaged, or where it has no tokenizer; ConfigError
    or DataError where model and tokenizer do not belong together.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder, a checkpoint, or a folder that to-hf wrote.")
    if path.is_dir() and (path / "config.json").is_file():
        exported = exported_source(path)
        attention = AttentionConfig.model_validate({"rule": exported.rule})
        message, images = exported_system_message(path), exported_images(path)
        template = _template(exported.config, tokenizer or path, message)
        stage = _stage(exported.config, attention, exported.source, device, dtype)
        return LoadedModel(path, stage, template, _image_options(images))
    checkpoint = files.find_checkpoint(path)
    config, attention = load_model(checkpoint / files.CONFIG)
    template = _template(config, tokenizer or run_tokenizer(checkpoint), run_system_message(checkpoint))
    stage = _stage(config, attention, open_weights(checkpoint, config), device, dtype)
    return LoadedModel(checkpoint, stage, template, _image_options(run_images(checkpoint)))


def _template(config: ModelConfig, folder: Path, system_message: str) -> Template:
    tokenizer = Tokenizer(folder, FAMILIES[config.decoder.family].chat)
    tokenizer.check_vocabulary(config.decoder)
    # prompts are never truncated, so the longest training text plays no part
    return Template(tokenizer, num_media_tokens(config), MIN_TEXT_TOKENS, system_message)


def _stage(
    config: ModelConfig, attention: AttentionConfig, source: TensorSource, device: str, dtype: torch.dtype
) -> Stage:
    """Build the model from its tensors; one at a time is in memory as it is stored."""
    stage = stage_from_tensors(
        config, range(config.decoder.num_layers), attention, lambda name: source.get(name).to(device, dtype)
    )
    if config.decoder.tie_word_embeddings:
        assert stage.lm_head is not None and stage.input_embedder is not None
        tie_weights(stage.lm_head, stage.input_embedder.token_embedding)  # one table in memory instead of two
    return stage.requires_grad_(False).eval()


def _image_options(images: ImagesConfig) -> ImageOptions:
    return ImageOptions(images.transparency, images.exif_rotation)
