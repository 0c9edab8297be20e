"""The official AKI release: its tensor names, from and to ours.

The release has three parts: ``vision_encoder.`` (SigLIP), ``vision_tokenizer.`` (the resampler) and ``lang_model.``
(Phi-3 with rows of their own for added tokens, and with a bias on the head). At AKI-4B's size it holds 718 tensors.
"""

from pathlib import Path

from aki_megatron.checkpoint.conversion_report import STRICT, Allowed, Match, match
from aki_megatron.checkpoint.readers import Places, open_safetensors, open_torch_file
from aki_megatron.checkpoint.tensors import NameTable, TensorSource
from aki_megatron.checkpoint.weight_names import WeightRule, language_names, linear, model_shapes, names, vision_names
from aki_megatron.config.model import ModelConfig
from aki_megatron.errors import CheckpointError

ENCODER, RESAMPLER, LANGUAGE = PREFIXES = ("vision_encoder.", "vision_tokenizer.", "lang_model.")

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


def official_names(config: ModelConfig, *, vision: bool = True) -> NameTable:
    """Our names to the release's, for a model of this size; without the encoder's where ``vision`` is False.

    Raises CheckpointError for a model that the release's format cannot hold.
    """
    decoder = config.decoder
    fits = (
        decoder.family == "phi3"
        and decoder.lm_head_bias
        and decoder.num_added_tokens
        and not decoder.tie_word_embeddings
    )
    if not fits:
        raise CheckpointError(
            "The official AKI format holds a Phi-3 with a head of its own with a bias, and added tokens; the model has "
            f"family={decoder.family}, tie_word_embeddings={decoder.tie_word_embeddings}, lm_head_bias={decoder.lm_head_bias}, "
            f"num_added_tokens={decoder.num_added_tokens}."
        )
    table = names(RESAMPLER_RULES, prefix=RESAMPLER)
    table |= names(RESAMPLER_LAYER_RULES, prefix=RESAMPLER, layers=config.resampler.num_layers)
    table |= names(EXTRA_RULES, prefix=LANGUAGE)
    table |= language_names(decoder, LANGUAGE)
    return {**table, **vision_names(config.vision, ENCODER)} if vision else table


def open_official(path: Path) -> Places:
    """The tensors of a release: its safetensors file, a folder with it, or a training checkpoint (``.pt``).

    Errors: CheckpointError when it cannot be read, or is anything else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the release's safetensors, its folder, or a .pt.")
    source = open_torch_file(path) if path.is_file() and path.suffix != ".safetensors" else open_safetensors(path)
    if not any(name.startswith(PREFIXES) for name in source.facts):
        raise CheckpointError(
            f"{path} is not of the AKI release: no tensor's name begins with {', '.join(PREFIXES)} (the first is "
            f"{next(iter(source.facts), 'none')}). Folders of language models and of SigLIP are read by from-hf."
        )
    return source


def has_encoder(source: TensorSource) -> bool:
    """Whether a release holds the encoder; its training checkpoints leave it out."""
    return any(name.startswith(ENCODER) for name in source.facts)


def match_official(source: Places, config: ModelConfig, allowed: Allowed = STRICT) -> Match:
    """Compare a release with a model of this size, strictly.

    Errors: CheckpointError with every tensor that is missing, extra or of another shape and not allowed by name.
    """
    table = official_names(config, vision=has_encoder(source))
    return match(source.facts, table, model_shapes(config), source=str(source.path), allowed=allowed)
