"""A decoder family that the project does not have: what a user writes to add one, and its registration for a test.

Its attention has both biases and norms, and no weight has the name that it has in another family.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chat_folders import SENTENCES, Rules, byte_level

from aki_megatron.families.base import (
    STANDARD_CONFIG_KEYS,
    ChatFormat,
    Family,
    FamilyTraits,
    HFConfigKeys,
    ReferenceClasses,
    WeightNames,
    WeightRule,
)
from aki_megatron.families.registry import FAMILIES

NAME = "toy"

FAMILY = Family(
    traits=FamilyTraits(qkv_bias=True, qk_norm=True),
    config=HFConfigKeys(
        architecture="ToyForCausalLM",
        defaults={
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "ffn_dim": 96,
            "rms_norm_eps": 1e-6,
            "vocab_size": 500,
            "max_position_embeddings": 256,
            "head_dim": 16,
        },
        field_keys={**STANDARD_CONFIG_KEYS, "intermediate_size": "ffn_dim"},
        required={"attention_bias": False},
    ),
    weights=WeightNames(
        base_model_prefix="transformer.",
        layer_prefix="h.{i}.",
        embedding="wte.weight",
        final_norm="ln_f.weight",
        lm_head="output.weight",
        layer_rules=(
            WeightRule("attention_norm.weight", "ln_1.weight"),
            WeightRule("attention.qkv_proj.weight", "attn.q.weight", "attn.k.weight", "attn.v.weight"),
            WeightRule("attention.qkv_proj.bias", "attn.q.bias", "attn.k.bias", "attn.v.bias"),
            WeightRule("attention.q_norm.weight", "attn.ln_q.weight"),
            WeightRule("attention.k_norm.weight", "attn.ln_k.weight"),
            WeightRule("attention.out_proj.weight", "attn.o.weight"),
            WeightRule("mlp_norm.weight", "ln_2.weight"),
            WeightRule("mlp.gate_up_proj.weight", "ffn.gate.weight", "ffn.up.weight"),
            WeightRule("mlp.down_proj.weight", "ffn.down.weight"),
        ),
    ),
    chat=ChatFormat(
        conversation_start="<|begin|>\n",
        header_format="<|role|>{role}: ",
        turn_end="<|stop|>",
        turn_separator="\n\n",
        caption_start="<|begin|>",
        sample_end="<|end|>",
        stop_tokens=("<|stop|>", "<|end|>"),
    ),
    reference=ReferenceClasses(
        config="toy_reference.ToyConfig",
        layer="toy_reference.ToyDecoderLayer",
        norm="toy_reference.ToyRMSNorm",
        rotary="toy_reference.ToyRotaryEmbedding",
    ),
)


@contextmanager
def registered() -> Iterator[None]:
    """The registry with the family in it."""
    FAMILIES[NAME] = FAMILY
    try:
        yield
    finally:
        del FAMILIES[NAME]


def tokenizer_folder(folder: Path) -> Path:
    """A byte-level tokenizer with the family's special tokens."""
    specials = ("<|begin|>", "<|role|>", "<|stop|>", "<|end|>", "<|pad|>")
    return byte_level(folder, Rules(specials, {"eos_token": "<|end|>", "pad_token": "<|pad|>"}), SENTENCES)
