"""Decoder layer of the Phi-3 family: RMSNorm, fused projections without biases, rotary positions, SwiGLU.

B rows, T tokens, D width, Hq query heads, Hkv key and value heads, d head width.
Equal to transformers' Phi3DecoderLayer under a causal rule (tests/parity).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.attention import LayerCache, ModalityLayout, attend, attend_cached
from aki_megatron.config.model import DecoderConfig
from aki_megatron.model.linears import LinearFactory
from aki_megatron.model.rotary import rotate
from aki_megatron.model.split import gate_up_parts, qkv_parts


class Attention(nn.Module):
    """Self-attention of one layer. Rows of ``qkv``: all queries, all keys, all values."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory, residual_std: float) -> None:
        super().__init__()
        self.head_width = config.head_width
        self.queries_per_key = config.heads // config.kv_heads
        parts = qkv_parts(config)
        self.qkv = linears.column(config.width, sum(parts), bias=False, std=config.width**-0.5, parts=parts)
        self.out = linears.row(config.width, config.width, bias=False, std=residual_std)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layout: ModalityLayout | None,
        cache: LayerCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D].

        Without a cache rows see what ``layout`` says. With a cache and a layout (the prompt) the keys and values of
        the first ``lengths`` [B] places are kept as well; with a cache alone (T = 1) the new token sees all of it.
        """
        qkv = self.qkv(x).unflatten(-1, (-1, self.head_width))
        # a split layer holds fewer heads, in the same proportion
        kv_heads = qkv.shape[2] // (self.queries_per_key + 2)
        turned = rotate(qkv[:, :, :-kv_heads], cos, sin).transpose(1, 2)
        q, k, v = turned[:, :-kv_heads], turned[:, -kv_heads:], qkv[:, :, -kv_heads:].transpose(1, 2)
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


class FeedForward(nn.Module):
    """SwiGLU. Rows of ``gate_up``: the gate, then what it gates."""

    def __init__(self, config: DecoderConfig, linears: LinearFactory, residual_std: float) -> None:
        super().__init__()
        parts = gate_up_parts(config)
        self.gate_up = linears.column(config.width, sum(parts), bias=False, std=config.width**-0.5, parts=parts)
        self.down = linears.row(config.mlp_width, config.width, bias=False, std=residual_std)

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
        shrink = (2 * config.layers) ** -0.5
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config, linears, config.width**-0.5 * shrink)
        self.feed_forward_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.feed_forward = FeedForward(config, linears, config.mlp_width**-0.5 * shrink)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        layout: ModalityLayout | None,
        cache: LayerCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; the arguments are those of Attention."""
        x = x + self.attention(self.attention_norm(x), cos, sin, layout=layout, cache=cache, lengths=lengths)
        return x + self.feed_forward(self.feed_forward_norm(x))
