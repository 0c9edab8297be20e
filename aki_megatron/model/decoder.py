"""Decoder layer of the supported families: RMSNorm, fused projections, rotary position embedding, SwiGLU.

B sequences, T positions, D hidden size, Hq query heads, Hkv key and value heads, d head dim.
With a causal mask equal to transformers' layers of Phi-3, LLaMA, Qwen2 and Qwen3 (tests/parity).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.attention import AttentionMask, LayerCache, attend, attend_cached
from aki_megatron.config.model import DecoderConfig
from aki_megatron.config.trainable import LoraConfig
from aki_megatron.model.linears import LinearFactory
from aki_megatron.model.lora import Adapters, build_adapters
from aki_megatron.model.rotary import apply_rotary
from aki_megatron.model.sharding import gate_up_sizes, qkv_sizes


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the head dim. Every tensor rank holds the whole weight and applies it to its own heads."""

    def __init__(self, head_dim: int, eps: float, linears: LinearFactory) -> None:
        super().__init__(head_dim, eps=eps)
        self.linears = linears

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, d] -> [B, T, H, d]"""
        weight = self.linears.copy_to_tensor_parallel_region(self.weight)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Self-attention. The output features of ``qkv_proj`` are all queries, then all keys, then all values."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory, residual_std: float) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_key = config.num_heads // config.num_kv_heads
        traits, sizes, std = config.traits, qkv_sizes(config), config.hidden_size**-0.5
        self.qkv_proj = linears.column(config.hidden_size, sum(sizes), bias=traits.qkv_bias, std=std, part_sizes=sizes)
        self.q_norm = HeadNorm(config.head_dim, config.norm_eps, linears) if traits.qk_norm else None
        self.k_norm = HeadNorm(config.head_dim, config.norm_eps, linears) if traits.qk_norm else None
        self.out_proj = linears.row(config.attention_size, config.hidden_size, bias=False, std=residual_std)
        self.qkv_lora: Adapters | None = None
        self.out_lora: Adapters | None = None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        mask: AttentionMask | None,
        cache: LayerCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        With ``mask`` and no cache: training or inference over whole sequences. With both: prefill, which also stores
        the keys and values of the first ``lengths`` [B] positions. With a cache alone (T = 1): a decode step, in which
        the new token attends to the whole cache.
        """
        q, k, v = self.project(x, cos, sin)
        if mask is not None:
            context = attend(q, k, v, mask)
            if cache is not None:
                assert lengths is not None
                cache.fill(k, v, lengths)
        else:
            assert cache is not None
            cache.append(k, v)
            context = attend_cached(q, cache)
        return _adapted(self.out_proj, self.out_lora, context.transpose(1, 2).flatten(2))

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the kernel takes: rotated q [B, Hq, T, d] and k, v [B, Hkv, T, d] of x [B, T, D]."""
        qkv = _adapted(self.qkv_proj, self.qkv_lora, x).unflatten(-1, (-1, self.head_dim))
        # a tensor rank holds fewer heads, in the same proportion
        num_kv_heads = qkv.shape[2] // (self.queries_per_key + 2)
        qk = apply_rotary(self._normalize(qkv[:, :, :-num_kv_heads], num_kv_heads), cos, sin).transpose(1, 2)
        return qk[:, :-num_kv_heads], qk[:, -num_kv_heads:], qkv[:, :, -num_kv_heads:].transpose(1, 2)

    def _normalize(self, qk: Tensor, num_kv_heads: int) -> Tensor:
        """Normalize queries and keys [B, T, Hq + Hkv, d]; families without these norms return them unchanged."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        return torch.cat([self.q_norm(qk[:, :, :-num_kv_heads]), self.k_norm(qk[:, :, -num_kv_heads:])], dim=2)


class MLP(nn.Module):
    """SwiGLU. The output features of ``gate_up_proj`` are the gate, then what it gates."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory, residual_std: float) -> None:
        super().__init__()
        sizes, std = gate_up_sizes(config), config.hidden_size**-0.5
        self.gate_up_proj = linears.column(config.hidden_size, sum(sizes), bias=False, std=std, part_sizes=sizes)
        self.down_proj = linears.row(config.intermediate_size, config.hidden_size, bias=False, std=residual_std)
        self.gate_up_lora: Adapters | None = None
        self.down_lora: Adapters | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        gate, up = _adapted(self.gate_up_proj, self.gate_up_lora, x).chunk(2, dim=-1)
        return _adapted(self.down_proj, self.down_lora, F.silu(gate) * up)


def _adapted(layer: nn.Module, adapters: Adapters | None, x: Tensor) -> Tensor:
    """Return a linear layer's output with what its adapters add."""
    return layer(x) if adapters is None else layer(x) + adapters(x)


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer.

    Both residual projections are initialized smaller by sqrt(2 * num_layers), so that the variance of the residual
    stream does not grow with depth (GPT-2, Radford et al., 2019).
    """

    def __init__(self, config: DecoderConfig, linears: LinearFactory) -> None:
        super().__init__()
        residual_scale = (2 * config.num_layers) ** -0.5
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, linears, config.attention_size**-0.5 * residual_scale)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config, linears, config.intermediate_size**-0.5 * residual_scale)

    def add_adapters(self, config: DecoderConfig, lora: LoraConfig, linears: LinearFactory) -> None:
        """Add low-rank adapters to the linear layers that are targets; they add zero until they are trained."""
        attention, mlp = self.attention, self.mlp
        attention.qkv_lora = build_adapters("attention.qkv", config, lora, linears)
        attention.out_lora = build_adapters("attention.out", config, lora, linears)
        mlp.gate_up_lora = build_adapters("mlp.gate_up", config, lora, linears)
        mlp.down_lora = build_adapters("mlp.down", config, lora, linears)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        mask: AttentionMask | None,
        cache: LayerCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; the arguments are those of Attention."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask=mask, cache=cache, lengths=lengths)
        return x + self.mlp(self.mlp_norm(x))
