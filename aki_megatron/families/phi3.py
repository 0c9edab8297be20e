"""Phi-3 (Phi-3.5-mini-instruct), the decoder of AKI-4B."""

from typing import Any

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
from aki_megatron.families.weight_rules import NORMS_AND_OUTPUTS

FAMILY = Family(
    traits=FamilyTraits(qkv_bias=False, qk_norm=False),
    config=HFConfigKeys(
        architecture="Phi3ForCausalLM",
        defaults={
            "hidden_size": 3072,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "intermediate_size": 8192,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        rope_types=("default", "longrope"),
        rope_type_aliases={"su": "longrope"},  # its name in the first releases
        sliding_window_switch=None,
    ),
    weights=WeightNames(
        layer_rules=(
            *NORMS_AND_OUTPUTS,
            WeightRule("attention.qkv_proj.weight", "self_attn.qkv_proj.weight"),
            WeightRule("mlp.gate_up_proj.weight", "mlp.gate_up_proj.weight"),
        )
    ),
    chat=ChatFormat(
        conversation_start="<s> ",  # the space is a token: the AKI release's slow tokenizer puts it before <|system|>
        header_format="<|{role}|>\n",
        turn_end="<|end|>",
        turn_separator="\n",
        caption_start="<s>",
        sample_end="<|endoftext|>",  # as in the AKI release; the other families end every response alike
        stop_tokens=("<|endoftext|>", "<|end|>", "<|assistant|>"),
    ),
    reference=ReferenceClasses(
        config="transformers.Phi3Config",
        layer="transformers.models.phi3.modeling_phi3.Phi3DecoderLayer",
        norm="transformers.models.phi3.modeling_phi3.Phi3RMSNorm",
        rotary="transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding",
    ),
    published=(PublishedModel("microsoft/Phi-3.5-mini-instruct", 3072, 32, Licence("mit")),),
)

# fmt: off
PHI35_MINI_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "theta": 10000.0,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "short_factor": (
        1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, 1.0499999523162842, 1.0499999523162842,
        1.0499999523162842, 1.0499999523162842, 1.0499999523162842, 1.0699999332427979, 1.0999999046325684,
        1.1099998950958252, 1.1599998474121094, 1.1599998474121094, 1.1699998378753662, 1.2899998426437378,
        1.339999794960022, 1.679999828338623, 1.7899998426437378, 1.8199998140335083, 1.8499997854232788,
        1.8799997568130493, 1.9099997282028198, 1.9399996995925903, 1.9899996519088745, 2.0199997425079346,
        2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346,
        2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914,
        2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0799996852874756,
        2.0899996757507324, 2.189999580383301, 2.2199995517730713, 2.5899994373321533, 2.729999542236328,
        2.749999523162842, 2.8399994373321533,
    ),
    "long_factor": (
        1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115,
        1.600000023841858, 1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863,
        4.789999961853027, 7.400000095367432, 7.700000286102295, 9.09000015258789, 12.199999809265137,
        17.670000076293945, 24.46000099182129, 28.57000160217285, 30.420001983642578, 30.840002059936523,
        32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992, 50.340003967285156,
        50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457,
        62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457,
        63.77000427246094, 63.93000411987305, 63.96000289916992, 63.970001220703125, 64.02999877929688,
        64.06999969482422, 64.08000183105469, 64.12000274658203, 64.41000366210938, 64.4800033569336,
        64.51000213623047, 64.52999877929688, 64.83999633789062,
    ),
}
# fmt: on
"""model.decoder.rope as published with microsoft/Phi-3.5-mini-instruct: 48 factors for head dimension 96."""
