"""Perceiver resampler: a fixed number of latents reads an image's patch features.

N images, P patches, Q latents, W width of features and latents, D width of the decoder, H heads, d head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.config.model import ResamplerConfig
from aki_megatron.model.full_attention import attend_all


class ResamplerAttention(nn.Module):
    """Latents attend to the image and to themselves; no biases.

    Image and latents have LayerNorms of their own; keys and values come from both, image first.
    """

    def __init__(self, width: int, heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.norm_media = nn.LayerNorm(width, eps=eps)
        self.norm_latents = nn.LayerNorm(width, eps=eps)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Media [N, P, W], latents [N, Q, W] -> [N, Q, W]"""
        latents = self.norm_latents(latents)
        keys, values = self.key_value(torch.cat([self.norm_media(media), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (self.query(latents), keys, values))
        return self.out(attend_all(q, k, v).transpose(1, 2).flatten(2))


class ResamplerFeedForward(nn.Module):
    """LayerNorm, then two layers without biases and the exact GELU between them."""

    def __init__(self, width: int, ratio: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, ratio * width, bias=False)
        self.down = nn.Linear(ratio * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]"""
        return self.down(F.gelu(self.up(self.norm(x))))


class ResamplerBlock(nn.Module):
    """Cross-attention and feed-forward, both added to the latents."""

    def __init__(self, config: ResamplerConfig, width: int) -> None:
        super().__init__()
        self.attention = ResamplerAttention(width, config.num_heads, config.head_dim, config.norm_eps)
        self.feed_forward = ResamplerFeedForward(width, config.mlp_ratio, config.norm_eps)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Media [N, P, W], latents [N, Q, W] -> [N, Q, W]"""
        latents = latents + self.attention(media, latents)
        return latents + self.feed_forward(latents)


class PerceiverResampler(nn.Module):
    """Patch features to Q vectors of the decoder's width. Latents carry no position: their order means nothing."""

    def __init__(self, config: ResamplerConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.num_latents, inputs))
        self.blocks = nn.ModuleList(ResamplerBlock(config, inputs) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(inputs, eps=config.norm_eps)
        self.projection = nn.Linear(inputs, outputs)

    def forward(self, media: Tensor) -> Tensor:
        """[N, P, inputs] -> [N, Q, outputs]; N may be 0."""
        latents = self.latents.expand(media.shape[0], -1, -1)
        for block in self.blocks:
            latents = block(media, latents)
        return self.projection(self.norm(latents))
