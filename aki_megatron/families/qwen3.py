"""Qwen3 (Qwen3-1.7B, Qwen3-8B): Qwen2's keys and chat format, with norms on queries and keys instead of biases."""

from aki_megatron.families import qwen2
from aki_megatron.families.base import (
    Family,
    FamilyTraits,
    HFConfigKeys,
    Licence,
    PublishedModel,
    ReferenceClasses,
    WeightNames,
    WeightRule,
)
from aki_megatron.families.weight_rules import NORMS_AND_OUTPUTS, SEPARATE_PROJECTIONS

_QK_NORMS = (
    WeightRule("attention.q_norm.weight", "self_attn.q_norm.weight"),
    WeightRule("attention.k_norm.weight", "self_attn.k_norm.weight"),
)

FAMILY = Family(
    traits=FamilyTraits(qkv_bias=False, qk_norm=True),
    config=HFConfigKeys(
        architecture="Qwen3ForCausalLM",
        defaults={**qwen2.FAMILY.config.defaults, "head_dim": 128},
        required={"attention_bias": False},
    ),
    weights=WeightNames(layer_rules=(*NORMS_AND_OUTPUTS, *SEPARATE_PROJECTIONS, *_QK_NORMS)),
    # the published template also writes an empty thinking block before the last answer; the papers' format does not
    chat=qwen2.FAMILY.chat,
    reference=ReferenceClasses(
        config="transformers.Qwen3Config",
        layer="transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer",
        norm="transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm",
        rotary="transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding",
    ),
    published=(
        PublishedModel("Qwen/Qwen3-0.6B", 1024, 28, Licence("apache-2.0")),
        PublishedModel("Qwen/Qwen3-1.7B", 2048, 28, Licence("apache-2.0")),
        PublishedModel("Qwen/Qwen3-4B", 2560, 36, Licence("apache-2.0")),
        PublishedModel("Qwen/Qwen3-8B", 4096, 36, Licence("apache-2.0")),
    ),
)
