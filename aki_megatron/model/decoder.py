"""Decoder layer of the families of config/model.py: RMSNorm, fused projections, rotary positions, SwiGLU.

B rows, T tokens, D width, Hq query heads, Hkv key and value heads, d head width.
Under a causal rule equal to transformers' layers of Phi-3, LLaMA, Qwen2 and Qwen3 (tests/parity).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.attention import AttentionMask, LayerCache, attend, attend_cached
from aki_megatron.config.model import DecoderConfig
from aki_megatron.model.linears import LinearFactory
from aki_megatron.model.rotary import rotate
from aki_megatron.model.split import gate_up_parts, qkv_parts


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the width of a head. Every process has the whole weight and uses it for its share of the heads."""

    def __init__(self, head_dim: int, eps: float, linears: LinearFactory) -> None:
        super().__init__(head_dim, eps=eps)
        self.linears = linears

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, H, d] -> [B, T, H, d]"""
        return F.rms_norm(x, self.normalized_shape, self.linears.shared(self.weight), self.eps)


class Attention(nn.Module):
    """Self-attention of one layer. Rows of ``qkv``: all queries, all keys, all values."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory, residual_std: float) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_key = config.num_heads // config.num_kv_heads
        traits, parts, std = config.traits, qkv_parts(config), config.hidden_size**-0.5
        self.qkv = linears.column(config.hidden_size, sum(parts), bias=traits.qkv_bias, std=std, parts=parts)
        self.query_norm = HeadNorm(config.head_dim, config.norm_eps, linears) if traits.qk_norm else None
        self.key_norm = HeadNorm(config.head_dim, config.norm_eps, linears) if traits.qk_norm else None
        self.out = linears.row(config.hidden_size, config.hidden_size, bias=False, std=residual_std)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layout: AttentionMask | None,
        cache: LayerCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        Without a cache rows see what ``layout`` says. With a cache and a layout (the prompt) the keys and values of
        the first ``lengths`` [B] places are kept as well; with a cache alone (T = 1) the new token sees all of it.
        """
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_dim))
        # a split layer holds fewer heads, in the same proportion
        num_kv_heads = qkv.shape[2] // (self.queries_per_key + 2)
        turned = rotate(self._normed(qkv[:, :, :-num_kv_heads], num_kv_heads), cos, sin).transpose(1, 2)
        q, k, v = turned[:, :-num_kv_heads], turned[:, -num_kv_heads:], qkv[:, :, -num_kv_heads:].transpose(1, 2)
        if layout is not None:
            seen = attend(q, k, v, layout)
            if cache is not None:
                assert lengths is not None
                cache.fill(k, v, lengths)
        else:
            assert cache is not None
            cache.append(k, v)
            seen = attend_cached(q, cache)
        return self.out(seen.transpose(1, 2).flatten(2))

    def _normed(self, qk: Tensor, num_kv_heads: int) -> Tensor:
        """Queries and keys [B, T, Hq + Hkv, d], as they are in a family without norms of them."""
        if self.query_norm is None or self.key_norm is None:
            return qk
        return torch.cat([self.query_norm(qk[:, :, :-num_kv_heads]), self.key_norm(qk[:, :, -num_kv_heads:])], dim=2)


class FeedForward(nn.Module):
    """SwiGLU. Rows of ``gate_up``: the gate, then what it gates."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory, residual_std: float) -> None:
        super().__init__()
        parts = gate_up_parts(config)
        self.gate_up = linears.column(
            config.hidden_size, sum(parts), bias=False, std=config.hidden_size**-0.5, parts=parts
        )
        self.down = linears.row(config.intermediate_size, config.hidden_size, bias=False, std=residual_std)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm decoder layer.

    Both residual projections start smaller by sqrt(2 * layers), so that the variance of the residual stream does not
    grow with depth (GPT-2's rule).
    """

    def __init__(self, config: DecoderConfig, linears: LinearFactory) -> None:
        super().__init__()
        shrink = (2 * config.num_layers) ** -0.5
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config, linears, config.hidden_size**-0.5 * shrink)
        self.feed_forward_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = FeedForward(config, linears, config.intermediate_size**-0.5 * shrink)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layout: AttentionMask | None,
        cache: LayerCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; the arguments are those of Attention."""
        x = x + self.attention(self.attention_norm(x), cos, sin, layout=layout, cache=cache, lengths=lengths)
        return x + self.feed_forward(self.feed_forward_norm(x))
