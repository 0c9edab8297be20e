"""Weights of the official AKI release: tensor names, opening, and matching with a model.

Its names begin with ``vision_encoder.`` (SigLIP), ``vision_tokenizer.`` (the resampler) or ``lang_model.`` (Phi-3 with
a separate embedding of the added tokens and with an LM head bias). AKI-4B has 718 tensors.
"""

from dataclasses import replace
from pathlib import Path

from aki_megatron.checkpoint.conversion_report import (
    STRICT,
    AllowedMismatches,
    TensorMatch,
    TensorRecord,
    match_tensors,
)
from aki_megatron.checkpoint.readers import FileTensors, open_safetensors, open_torch_file
from aki_megatron.checkpoint.shapes import model_shapes
from aki_megatron.checkpoint.tensors import NameTable, TensorSource
from aki_megatron.checkpoint.weight_names import is_buffer, language_names, linear_rules, name_table, vision_names
from aki_megatron.config.model import ModelConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.families.base import WeightRule

VISION_ENCODER, RESAMPLER, LANGUAGE = PREFIXES = ("vision_encoder.", "vision_tokenizer.", "lang_model.")

RESAMPLER_LAYER_RULES = (
    *linear_rules("input_embedder.resampler.layers.{i}.attention.norm_media", "layers.{i}.0.norm_media"),
    *linear_rules("input_embedder.resampler.layers.{i}.attention.norm_latents", "layers.{i}.0.norm_latents"),
    WeightRule("input_embedder.resampler.layers.{i}.attention.q_proj.weight", "layers.{i}.0.to_q.weight"),
    WeightRule("input_embedder.resampler.layers.{i}.attention.kv_proj.weight", "layers.{i}.0.to_kv.weight"),
    WeightRule("input_embedder.resampler.layers.{i}.attention.out_proj.weight", "layers.{i}.0.to_out.weight"),
    *linear_rules("input_embedder.resampler.layers.{i}.mlp.norm", "layers.{i}.1.0"),
    WeightRule("input_embedder.resampler.layers.{i}.mlp.up_proj.weight", "layers.{i}.1.1.weight"),
    WeightRule("input_embedder.resampler.layers.{i}.mlp.down_proj.weight", "layers.{i}.1.3.weight"),
)

RESAMPLER_RULES = (
    WeightRule("input_embedder.resampler.latents", "latents"),
    *linear_rules("input_embedder.resampler.norm", "norm"),
    *linear_rules("input_embedder.resampler.projection", "projection"),
)

ADDED_RULES = (
    WeightRule("input_embedder.token_embedding.added_tokens", "model.embed_tokens.additional_embedding.weight"),
    *linear_rules("lm_head.added_tokens", "lm_head.additional_fc"),
    WeightRule("lm_head.base.bias", "lm_head.bias"),
)


def official_names(config: ModelConfig, *, vision: bool = True) -> NameTable:
    """Native to official names, for a model of this size; without the vision encoder's if ``vision`` is False.

    Raises CheckpointError for a model that the release's format cannot hold.
    """
    decoder = config.decoder
    representable = (
        decoder.family == "phi3"
        and decoder.lm_head_bias
        and decoder.num_added_tokens
        and not decoder.tie_word_embeddings
    )
    if not representable:
        raise CheckpointError(
            "The official AKI format holds a Phi-3 with an untied LM head with a bias, and added tokens; the model has "
            f"family={decoder.family}, tie_word_embeddings={decoder.tie_word_embeddings}, "
            f"lm_head_bias={decoder.lm_head_bias}, num_added_tokens={decoder.num_added_tokens}."
        )
    table = name_table(RESAMPLER_RULES, prefix=RESAMPLER)
    table |= name_table(RESAMPLER_LAYER_RULES, prefix=RESAMPLER, layers=config.resampler.num_layers)
    table |= name_table(ADDED_RULES, prefix=LANGUAGE)
    table |= language_names(decoder, LANGUAGE)
    return {**table, **vision_names(config.vision, VISION_ENCODER)} if vision else table


def open_official(path: Path) -> FileTensors:
    """The tensors of a release: its safetensors file, a folder with it, or a training checkpoint (``.pt``).

    Raises CheckpointError when it cannot be read, or is anything else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the release's safetensors, its folder, or a .pt.")
    source = open_torch_file(path) if path.is_file() and path.suffix != ".safetensors" else open_safetensors(path)
    if not any(name.startswith(PREFIXES) for name in source.specs):
        raise CheckpointError(
            f"{path} is not of the AKI release: no tensor's name begins with {', '.join(PREFIXES)} (the first is "
            f"{next(iter(source.specs), 'none')}). Folders of language models and of SigLIP are read by from-hf."
        )
    return source


def has_vision_encoder(source: TensorSource) -> bool:
    """Whether a release holds the vision encoder; its training checkpoints leave it out."""
    return any(name.startswith(VISION_ENCODER) for name in source.specs)


def match_official(source: FileTensors, config: ModelConfig, allowed: AllowedMismatches = STRICT) -> TensorMatch:
    """Match a release with a model of this size.

    Raises CheckpointError with every tensor that is missing, unexpected or of another shape and not allowed by name.
    """
    table = official_names(config, vision=has_vision_encoder(source))
    buffers = [name for name in source.specs if is_buffer(name)]
    specs = {name: spec for name, spec in source.specs.items() if name not in buffers}
    match = match_tensors(specs, table, model_shapes(config), source=str(source.path), allowed=allowed)
    skipped = tuple(TensorRecord("skipped", (name,), (), source.specs[name].shape) for name in buffers)
    return replace(match, records=match.records + skipped)
