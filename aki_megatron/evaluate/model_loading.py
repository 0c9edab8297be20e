"""Load a model that answers: from a run, a checkpoint, or a folder that ``to-hf`` wrote. The one place that does.

What belongs to the weights comes with them: tokenizer, system message, and how images become pixels.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.conversion_report import REPORT
from aki_megatron.checkpoint.conversion_steps import open_checkpoint
from aki_megatron.checkpoint.hf_export import exported_images, exported_source, exported_system_message
from aki_megatron.checkpoint.initial_weights import copy_weights
from aki_megatron.checkpoint.logits_check import stage_from_tensors
from aki_megatron.checkpoint.run_text import run_images, run_system_message, run_tokenizer
from aki_megatron.checkpoint.tensors import TensorSource
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.data import ImagesConfig
from aki_megatron.config.model import ModelConfig
from aki_megatron.data.image import ImageOptions
from aki_megatron.data.media import Decoders, media_decoders, num_media_tokens
from aki_megatron.data.template import MIN_TEXT_TOKENS, Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import CheckpointError
from aki_megatron.evaluate.generation_check import quiet
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import Stage, build_model, tie_weights
from aki_megatron.parallel.megatron import build_linears
from aki_megatron.parallel.topology import Topology

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Name -> precision in which a model answers."""

HF_CONFIG = "config.json"


@dataclass(frozen=True)
class ModelFolder:
    """Where a model's weights are, opened but not read.

    path       the checkpoint, or the exported folder
    name       for people: the run and its checkpoint, or the folder
    digest     of the weights: that of copies of a folder is equal, wherever they lie
    tokenizer  its folder
    """

    path: Path
    name: str
    digest: str
    source: TensorSource
    config: ModelConfig
    attention: AttentionConfig
    tokenizer: Path
    system_message: str
    images: ImagesConfig


@dataclass(frozen=True)
class LoadedModel:
    """A model with what turns questions into prompts, and tokens into text.

    path           the checkpoint or the folder that it was read from
    template       renders conversations as in training, with the run's system message
    image_options  how images become pixels, as in training
    """

    path: Path
    stage: Stage
    template: Template
    image_options: ImageOptions

    def media_decoders(self) -> Decoders:
        """Return decoders of what this model sees and hears; safe to share between threads."""
        return media_decoders(self.stage.config, self.image_options)


def open_model(path: Path, tokenizer: Path | None = None, *, verify: bool = True) -> ModelFolder:
    """Open a run folder (its newest checkpoint), a checkpoint, or an exported folder.

    tokenizer  instead of the one that comes with the weights
    verify     compare every file of a checkpoint with its manifest first; false: another process does

    Raises CheckpointError where there is no model, or a damaged one; DataError for a bad tokenizer.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run folder, a checkpoint, or a folder that to-hf wrote.")
    if (path / HF_CONFIG).is_file() and not (path / files.MANIFEST).is_file():
        exported = exported_source(path)
        return ModelFolder(
            path=path,
            name=path.resolve().name,
            digest=_exported_digest(path),
            source=exported.source,
            config=exported.config,
            attention=AttentionConfig.model_validate({"rule": exported.rule}),
            tokenizer=tokenizer or path,
            system_message=exported_system_message(path),
            images=exported_images(path),
        )
    source, model = open_checkpoint(path, verify=verify)
    checkpoint = source.path.resolve()
    run = checkpoint.parent.parent if checkpoint.parent.name == files.CHECKPOINTS else checkpoint.parent
    return ModelFolder(
        path=source.path,
        name=f"{run.name}/{checkpoint.name}",
        digest=files.file_digest(checkpoint / files.MANIFEST)["sha256"],
        source=source,
        config=model.config,
        attention=model.attention,
        tokenizer=tokenizer or run_tokenizer(checkpoint),
        system_message=run_system_message(checkpoint),
        images=run_images(checkpoint),
    )


def _exported_digest(folder: Path) -> str:
    """Return the digest of what an exported folder's report says of its files; of names and sizes without a report."""
    if (folder / REPORT).is_file():
        return str(files.file_digest(folder / REPORT)["sha256"])
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}
    described = (folder / HF_CONFIG).read_bytes() + json.dumps(sizes).encode()
    return hashlib.sha256(described).hexdigest()


def load_model(
    folder: ModelFolder, *, device: torch.device, dtype: torch.dtype, topology: Topology | None = None
) -> LoadedModel:
    """Read the weights to a device; with ``topology`` this rank's shard of every layer, split over its tensor ranks.

    Raises ConfigError where the tokenizer is not the model's.
    """
    config, family = folder.config, FAMILIES[folder.config.decoder.family]
    with quiet():  # transformers warns about the config.json of an exported folder, whose code it does not run
        tokenizer = Tokenizer(folder.tokenizer, family.chat)
    tokenizer.check_vocabulary(config.decoder)
    # prompts are never cut, so the longest training text plays no part
    template = Template(tokenizer, num_media_tokens(config), MIN_TEXT_TOKENS, folder.system_message)
    if topology is None or topology.tensor == 1:
        # one tensor at a time: the whole model is never in memory twice
        layers = range(config.decoder.num_layers)
        stage = stage_from_tensors(
            config, layers, folder.attention, lambda name: folder.source.get(name).to(device, dtype)
        )
        if config.decoder.tie_word_embeddings:
            assert stage.lm_head is not None and stage.input_embedder is not None
            tie_weights(stage.lm_head, stage.input_embedder.token_embedding)  # one table in memory instead of two
    else:
        stage = build_model(config, attention=folder.attention, linears=build_linears(topology)).to(dtype)
        copy_weights(stage, folder.source, tensor_rank=topology.tensor_rank, tensor_ranks=topology.tensor)
        stage = stage.to(device)
    images = ImageOptions(folder.images.transparency, folder.images.exif_rotation)
    return LoadedModel(folder.path, stage.eval().requires_grad_(False), template, images)


def default_device() -> str:
    """Return the device that is taken if none is named: a GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_saved_model(
    path: Path,
    *,
    tokenizer: Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Open a model as ``open_model`` does and load it whole onto one device."""
    return load_model(open_model(path, tokenizer), device=torch.device(device), dtype=dtype)
