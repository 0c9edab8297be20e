"""A trained model with all that it reads prompts with: from a run folder, a checkpoint, or an exported folder."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.hf_export import exported_images, exported_source, exported_system_message
from aki_megatron.checkpoint.initial_weights import open_weights
from aki_megatron.checkpoint.logits_check import stage_from_tensors
from aki_megatron.checkpoint.run_text import KEPT_FILES, run_images, run_system_message, run_tokenizer
from aki_megatron.checkpoint.tensors import TensorSource
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.data import ImagesConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.save import load_model
from aki_megatron.data.image import ImageOptions
from aki_megatron.data.media import num_media_tokens
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import Stage


@dataclass(frozen=True)
class SavedModel:
    """A whole model in evaluation mode, its template, and how its images are decoded.

    path  the checkpoint or folder that it is from
    """

    stage: Stage
    template: Template
    image_options: ImageOptions
    path: Path


def open_saved_model(
    path: Path,
    *,
    tokenizer: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SavedModel:
    """Load a model onto one device.

    path       a checkpoint, a run folder or folder of checkpoints (the newest is taken), or a folder of convert.py
               to-hf
    tokenizer  folder; None: the one that the checkpoint or folder holds, or that of its run

    Raises CheckpointError where there is no intact model or no tokenizer, ConfigError where the tokenizer is another
    model's.
    """
    if (path / "config.json").is_file():
        exported = exported_source(path)
        attention = AttentionConfig.model_validate({"rule": exported.rule})
        message, images = exported_system_message(path), exported_images(path)
        with TemporaryDirectory() as folder:
            # without the folder's config.json, because of which transformers would warn of a model it does not know
            for name in [] if tokenizer else KEPT_FILES:
                if (path / name).is_file():
                    shutil.copy(path / name, folder)
            return _saved_model(exported.source, exported.config, attention, tokenizer or Path(folder), message, images,
                                path=path, device=device, dtype=dtype)  # fmt: skip
    checkpoint = files.find_checkpoint(path)
    config, attention = load_model(checkpoint / files.CONFIG)
    source = open_weights(checkpoint, config)
    message, images = run_system_message(checkpoint), run_images(checkpoint)
    return _saved_model(source, config, attention, tokenizer or run_tokenizer(checkpoint), message, images,
                        path=checkpoint, device=device, dtype=dtype)  # fmt: skip


def _saved_model(
    source: TensorSource,
    config: ModelConfig,
    attention: AttentionConfig,
    tokenizer: Path,
    system_message: str,
    images: ImagesConfig,
    *,
    path: Path,
    device: torch.device | str,
    dtype: torch.dtype,
) -> SavedModel:
    words = Tokenizer(tokenizer, FAMILIES[config.decoder.family].chat)
    words.check_vocabulary(config.decoder)

    def tensor(name: str) -> Tensor:
        return source.get(name).to(device=device, dtype=dtype)

    stage = stage_from_tensors(config, range(config.decoder.num_layers), attention, tensor).eval()
    positions = config.decoder.rope.max_position_embeddings
    template = Template(words, num_media_tokens(config), positions, system_message)
    return SavedModel(stage, template, ImageOptions(images.transparency, images.exif_rotation), path)
