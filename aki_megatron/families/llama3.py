"""LLaMA 3 (LLaMA-3.2-3B-Instruct)."""

from aki_megatron.families.base import (
    ChatFormat,
    Family,
    FamilyTraits,
    HFConfigKeys,
    Licence,
    PublishedModel,
    ReferenceClasses,
    WeightNames,
)
from aki_megatron.families.weight_rules import NORMS_AND_OUTPUTS, SEPARATE_PROJECTIONS

FAMILY = Family(
    traits=FamilyTraits(qkv_bias=False, qk_norm=False),
    config=HFConfigKeys(
        architecture="LlamaForCausalLM",
        defaults={
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "intermediate_size": 11008,
            "rms_norm_eps": 1e-6,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
        },
        required={"attention_bias": False, "mlp_bias": False},
        rope_types=("default", "llama3"),
    ),
    weights=WeightNames(layer_rules=(*NORMS_AND_OUTPUTS, *SEPARATE_PROJECTIONS)),
    # the published template also writes dates before the system message; the papers' format does not
    chat=ChatFormat(
        conversation_start="<|begin_of_text|>",
        header_format="<|start_header_id|>{role}<|end_header_id|>\n\n",
        turn_end="<|eot_id|>",
        turn_separator="",
        caption_start="<|begin_of_text|>",
        sample_end="<|eot_id|>",
        stop_tokens=("<|eot_id|>", "<|end_of_text|>"),
    ),
    reference=ReferenceClasses(
        config="transformers.LlamaConfig",
        layer="transformers.models.llama.modeling_llama.LlamaDecoderLayer",
        norm="transformers.models.llama.modeling_llama.LlamaRMSNorm",
        rotary="transformers.models.llama.modeling_llama.LlamaRotaryEmbedding",
    ),
    published=(
        PublishedModel("meta-llama/Llama-3.2-1B-Instruct", 2048, 16, Licence("llama3.2")),
        PublishedModel("meta-llama/Llama-3.2-3B-Instruct", 3072, 28, Licence("llama3.2")),
        PublishedModel("meta-llama/Llama-3.1-8B-Instruct", 4096, 32, Licence("llama3.1")),
    ),
)
