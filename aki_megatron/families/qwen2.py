"""Qwen2 and Qwen2.5 (Qwen2.5-3B-Instruct)."""

from aki_megatron.families.base import (
    ChatFormat,
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

_QKV_BIAS = WeightRule(
    "attention.qkv_proj.bias", "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"
)
_RESEARCH_LICENCE = Licence(
    "other", "qwen-research", "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE"
)
"""Of Qwen2.5-3B, which excludes commercial use."""

FAMILY = Family(
    traits=FamilyTraits(qkv_bias=True, qk_norm=False),
    config=HFConfigKeys(
        architecture="Qwen2ForCausalLM",
        defaults={
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 22016,
            "rms_norm_eps": 1e-6,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
        },
    ),
    weights=WeightNames(layer_rules=(*NORMS_AND_OUTPUTS, *SEPARATE_PROJECTIONS, _QKV_BIAS)),
    # the published template also writes a system message of its own; the papers' format has AKI's
    chat=ChatFormat(
        conversation_start="",
        header_format="<|im_start|>{role}\n",
        turn_end="<|im_end|>",
        turn_separator="\n",
        caption_start="",  # these tokenizers have no token that begins a text
        sample_end="<|im_end|>",
        stop_tokens=("<|im_end|>", "<|endoftext|>"),
    ),
    reference=ReferenceClasses(
        config="transformers.Qwen2Config",
        layer="transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer",
        norm="transformers.models.qwen2.modeling_qwen2.Qwen2RMSNorm",
        rotary="transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding",
    ),
    published=(
        PublishedModel("Qwen/Qwen2.5-0.5B-Instruct", 896, 24, Licence("apache-2.0")),
        PublishedModel("Qwen/Qwen2.5-1.5B-Instruct", 1536, 28, Licence("apache-2.0")),
        PublishedModel("Qwen/Qwen2.5-3B-Instruct", 2048, 36, _RESEARCH_LICENCE),
        PublishedModel("Qwen/Qwen2.5-7B-Instruct", 3584, 28, Licence("apache-2.0")),
    ),
)
