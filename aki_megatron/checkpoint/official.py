"""The official AKI release: its tensor names, from and to ours.

The release has three parts: ``vision_encoder.`` (SigLIP), ``vision_tokenizer.`` (the resampler) and ``lang_model.``
(Phi-3 with rows of their own for added tokens, and with a bias on the head). At AKI-4B's size it holds 718 tensors.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from aki_megatron.checkpoint.weights import (
    DECODER_LAYER_RULES,
    DECODER_RULES,
    POOLING_RULES,
    VISION_LAYER_RULES,
    VISION_RULES,
    TensorFiles,
    WeightRule,
    check_shapes,
    linear,
    model_shapes,
    names,
)
from aki_megatron.config.model import ModelConfig
from aki_megatron.flow import CheckpointError

RESAMPLER_LAYER_RULES = (
    *linear("front.resampler.blocks.{i}.attention.norm_media", "layers.{i}.0.norm_media"),
    *linear("front.resampler.blocks.{i}.attention.norm_latents", "layers.{i}.0.norm_latents"),
    WeightRule("front.resampler.blocks.{i}.attention.query.weight", "layers.{i}.0.to_q.weight"),
    WeightRule("front.resampler.blocks.{i}.attention.key_value.weight", "layers.{i}.0.to_kv.weight"),
    WeightRule("front.resampler.blocks.{i}.attention.out.weight", "layers.{i}.0.to_out.weight"),
    *linear("front.resampler.blocks.{i}.feed_forward.norm", "layers.{i}.1.0"),
    WeightRule("front.resampler.blocks.{i}.feed_forward.up.weight", "layers.{i}.1.1.weight"),
    WeightRule("front.resampler.blocks.{i}.feed_forward.down.weight", "layers.{i}.1.3.weight"),
)

RESAMPLER_RULES = (
    WeightRule("front.resampler.latents", "latents"),
    *linear("front.resampler.norm", "norm"),
    *linear("front.resampler.projection", "projection"),
)

EXTRA_RULES = (
    WeightRule("front.embedding.extra", "model.embed_tokens.additional_embedding.weight"),
    *linear("head.extra", "lm_head.additional_fc"),
    WeightRule("head.output.bias", "lm_head.bias"),
)


def official_names(config: ModelConfig, *, vision: bool = True) -> dict[str, str]:
    """Our names to the release's, for a model of this size; without the encoder's where ``vision`` is False.

    Raises CheckpointError for a model that the release's format cannot hold.
    """
    decoder = config.decoder
    if decoder.tie_embeddings or not decoder.head_bias or not decoder.extra_tokens:
        raise CheckpointError(
            "The official AKI format holds a head of its own with a bias, and added tokens; the model has "
            f"tie_embeddings={decoder.tie_embeddings}, head_bias={decoder.head_bias}, "
            f"extra_tokens={decoder.extra_tokens}."
        )
    table = names(RESAMPLER_RULES, prefix="vision_tokenizer.")
    table |= names(RESAMPLER_LAYER_RULES, prefix="vision_tokenizer.", layers=config.resampler.layers)
    table |= names((*DECODER_RULES, *EXTRA_RULES), prefix="lang_model.")
    table |= names(DECODER_LAYER_RULES, prefix="lang_model.", layers=decoder.layers)
    if vision:
        pooling = POOLING_RULES if config.vision.pooling_head else ()
        table |= names((*VISION_RULES, *pooling), prefix="vision_encoder.")
        table |= names(VISION_LAYER_RULES, prefix="vision_encoder.", layers=config.vision.layers)
    return table


def from_official(tensors: Mapping[str, Tensor], config: ModelConfig, *, vision: bool = True) -> dict[str, Tensor]:
    """A release's tensors under our names, strictly: all of them, no other, right shapes (CheckpointError).

    The release's training checkpoints leave the encoder out: ``vision=False``.
    """
    table = official_names(config, vision=vision)
    shapes = model_shapes(config)
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(got, {theirs: shapes[ours] for ours, theirs in table.items()}, "the official release")
    return {ours: tensors[theirs] for ours, theirs in table.items()}


def to_official(tensors: Mapping[str, Tensor], config: ModelConfig, *, vision: bool = True) -> dict[str, Tensor]:
    """Our tensors under the release's names; the reverse of from_official."""
    table = official_names(config, vision=vision)
    shapes = model_shapes(config)
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_shapes(got, {ours: shapes[ours] for ours in table}, "the model")
    return {theirs: tensors[ours] for ours, theirs in table.items()}


def read_official(path: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a release's safetensors file, or of a folder with it, under our names."""
    files = TensorFiles(path)
    return from_official(dict(files.read(files.shapes)), config)
