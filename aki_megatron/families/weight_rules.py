"""Weight names that several families share, within one decoder layer."""

from aki_megatron.families.base import WeightRule

NORMS_AND_OUTPUTS = (
    WeightRule("attention_norm.weight", "input_layernorm.weight"),
    WeightRule("attention.out_proj.weight", "self_attn.o_proj.weight"),
    WeightRule("mlp_norm.weight", "post_attention_layernorm.weight"),
    WeightRule("mlp.down_proj.weight", "mlp.down_proj.weight"),
)

SEPARATE_PROJECTIONS = (
    WeightRule(
        "attention.qkv_proj.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    WeightRule("mlp.gate_up_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"),
)
"""Queries, keys and values are three tensors, gate and up are two; our model holds each group fused."""
