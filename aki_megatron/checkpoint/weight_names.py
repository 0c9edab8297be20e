"""Names of tensors in external folders, by ours.

Rules are rows (native name, external names); ``{i}`` stands for the layer number. Several external names: the native
tensor is their concatenation along axis 0, in this order (checkpoint/tensors.py). The rules of decoder layers are their
family's (aki_megatron/families); Hugging Face folders and the official AKI release differ in the prefix.
"""

from collections.abc import Iterable

from aki_megatron.checkpoint.tensors import NameTable
from aki_megatron.config.model import AudioConfig, DecoderConfig, VisionConfig
from aki_megatron.families.base import WeightRule
from aki_megatron.families.registry import FAMILIES

TOKEN_EMBEDDING, LM_HEAD = "input_embedder.token_embedding.base.weight", "lm_head.base.weight"
"""Native names of the two tensors [padded_vocab_size, D]."""

FINAL_NORM = "lm_head.norm.weight"

DECODER_LAYER = "layers.{i}."
"""Native prefix of the tensors of decoder layer i."""


_BUFFERS = ("position_ids", "inv_freq", "attn.bias", "masked_bias", "num_batches_tracked", "token_type_ids")
"""Ends of the names of tensors that older libraries save beside the weights: numbers that the code computes."""


def is_buffer(name: str) -> bool:
    """Whether a tensor's name is that of a buffer, which no model needs."""
    return name.endswith(_BUFFERS)


def linear_rules(native: str, external: str) -> tuple[WeightRule, WeightRule]:
    """Return the rules of a module with a weight and a bias, which no rank splits."""
    return WeightRule(f"{native}.weight", f"{external}.weight"), WeightRule(f"{native}.bias", f"{external}.bias")


VISION_LAYER_RULES = (
    *linear_rules("input_embedder.vision_encoder.layers.{i}.attention_norm", "encoder.layers.{i}.layer_norm1"),
    *linear_rules("input_embedder.vision_encoder.layers.{i}.attention.q_proj", "encoder.layers.{i}.self_attn.q_proj"),
    *linear_rules("input_embedder.vision_encoder.layers.{i}.attention.k_proj", "encoder.layers.{i}.self_attn.k_proj"),
    *linear_rules("input_embedder.vision_encoder.layers.{i}.attention.v_proj", "encoder.layers.{i}.self_attn.v_proj"),
    *linear_rules(
        "input_embedder.vision_encoder.layers.{i}.attention.out_proj", "encoder.layers.{i}.self_attn.out_proj"
    ),
    *linear_rules("input_embedder.vision_encoder.layers.{i}.mlp_norm", "encoder.layers.{i}.layer_norm2"),
    *linear_rules("input_embedder.vision_encoder.layers.{i}.mlp.up_proj", "encoder.layers.{i}.mlp.fc1"),
    *linear_rules("input_embedder.vision_encoder.layers.{i}.mlp.down_proj", "encoder.layers.{i}.mlp.fc2"),
)

VISION_RULES = (
    *linear_rules("input_embedder.vision_encoder.patch_embedding", "embeddings.patch_embedding"),
    WeightRule("input_embedder.vision_encoder.position_embedding", "embeddings.position_embedding.weight"),
    *linear_rules("input_embedder.vision_encoder.norm", "post_layernorm"),
)

POOLING_RULES = (
    WeightRule("input_embedder.vision_encoder.pooling_head.probe", "head.probe"),
    WeightRule("input_embedder.vision_encoder.pooling_head.attention.in_proj_weight", "head.attention.in_proj_weight"),
    WeightRule("input_embedder.vision_encoder.pooling_head.attention.in_proj_bias", "head.attention.in_proj_bias"),
    *linear_rules("input_embedder.vision_encoder.pooling_head.attention.out_proj", "head.attention.out_proj"),
    *linear_rules("input_embedder.vision_encoder.pooling_head.norm", "head.layernorm"),
    *linear_rules("input_embedder.vision_encoder.pooling_head.mlp.up_proj", "head.mlp.fc1"),
    *linear_rules("input_embedder.vision_encoder.pooling_head.mlp.down_proj", "head.mlp.fc2"),
)

AUDIO_LAYER_RULES = (
    *linear_rules("input_embedder.audio_encoder.layers.{i}.attention_norm", "layers.{i}.self_attn_layer_norm"),
    *linear_rules("input_embedder.audio_encoder.layers.{i}.attention.q_proj", "layers.{i}.self_attn.q_proj"),
    WeightRule("input_embedder.audio_encoder.layers.{i}.attention.k_proj.weight", "layers.{i}.self_attn.k_proj.weight"),
    *linear_rules("input_embedder.audio_encoder.layers.{i}.attention.v_proj", "layers.{i}.self_attn.v_proj"),
    *linear_rules("input_embedder.audio_encoder.layers.{i}.attention.out_proj", "layers.{i}.self_attn.out_proj"),
    *linear_rules("input_embedder.audio_encoder.layers.{i}.mlp_norm", "layers.{i}.final_layer_norm"),
    *linear_rules("input_embedder.audio_encoder.layers.{i}.mlp.up_proj", "layers.{i}.fc1"),
    *linear_rules("input_embedder.audio_encoder.layers.{i}.mlp.down_proj", "layers.{i}.fc2"),
)

AUDIO_RULES = (
    *linear_rules("input_embedder.audio_encoder.conv1", "conv1"),
    *linear_rules("input_embedder.audio_encoder.conv2", "conv2"),
    WeightRule("input_embedder.audio_encoder.position_embedding", "embed_positions.weight"),
    *linear_rules("input_embedder.audio_encoder.norm", "layer_norm"),
)


def name_table(
    rules: Iterable[WeightRule], *, prefix: str = "", layers: int | None = None
) -> dict[str, tuple[str, ...]]:
    """Return native name -> external names.

    prefix  put before the external names
    layers  number of layers of rules with ``{i}``: each gives an entry per layer
    """
    numbers = [""] if layers is None else [str(number) for number in range(layers)]
    return {
        rule.native.replace("{i}", number): tuple(prefix + name.replace("{i}", number) for name in rule.external)
        for number in numbers
        for rule in rules
    }


def language_names(config: DecoderConfig, prefix: str = "") -> NameTable:
    """Return the names of a stock language model of the decoder's family: those of the tensors AKI adds are not in it.

    prefix  put before the external names
    """
    weights = FAMILIES[config.family].weights
    base = prefix + weights.base_model_prefix
    table = {TOKEN_EMBEDDING: (base + weights.embedding,), FINAL_NORM: (base + weights.final_norm,)}
    if not config.tie_word_embeddings:
        table[LM_HEAD] = (prefix + weights.lm_head,)
    layer_rules = [
        WeightRule(DECODER_LAYER + rule.native, *(weights.layer_prefix + name for name in rule.external))
        for rule in weights.layer_rules
    ]
    return table | name_table(layer_rules, prefix=base, layers=config.num_layers)


def vision_names(config: VisionConfig, prefix: str) -> NameTable:
    """Return the names of a SigLIP encoder, with its pooling head where the configuration has one."""
    rules = (*VISION_RULES, *POOLING_RULES) if config.pooling_head else VISION_RULES
    return name_table(rules, prefix=prefix) | name_table(VISION_LAYER_RULES, prefix=prefix, layers=config.num_layers)


def audio_names(config: AudioConfig, prefix: str) -> NameTable:
    """Return the names of Whisper's encoder."""
    return name_table(AUDIO_RULES, prefix=prefix) | name_table(
        AUDIO_LAYER_RULES, prefix=prefix, layers=config.num_layers
    )
