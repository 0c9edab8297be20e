"""Perceiver resampler (Flamingo, Alayrac et al., 2022): a fixed number of latents attends to an item's features.

N items (images, recordings), P features of one (patches, time steps), Q latents, W hidden size of the encoder, D hidden
size of the decoder, H heads, d head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.config.model import ResamplerConfig
from aki_megatron.model.full_attention import full_attention


class ResamplerAttention(nn.Module):
    """Attention of the latents to patch features and latents; no biases.

    Features and latents have separate LayerNorms; keys and values come from both, features first.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm_media = nn.LayerNorm(hidden_size, eps=eps)
        self.norm_latents = nn.LayerNorm(hidden_size, eps=eps)
        self.q_proj = nn.Linear(hidden_size, inner, bias=False)
        self.kv_proj = nn.Linear(hidden_size, 2 * inner, bias=False)
        self.out_proj = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Media [N, P, W], latents [N, Q, W] -> [N, Q, W]"""
        q, k, v = self.project(media, latents)
        return self.out_proj(full_attention(q, k, v).transpose(1, 2).flatten(2))

    def project(self, media: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [N, H, Q, d] of the latents, k and v [N, H, P + Q, d] of the features and then the latents."""
        latents = self.norm_latents(latents)
        keys, values = self.kv_proj(torch.cat([self.norm_media(media), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (self.q_proj(latents), keys, values))
        return q, k, v


class ResamplerMLP(nn.Module):
    """LayerNorm, then two linear layers without biases and the exact GELU between them."""

    def __init__(self, hidden_size: int, ratio: int, eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=eps)
        self.up_proj = nn.Linear(hidden_size, ratio * hidden_size, bias=False)
        self.down_proj = nn.Linear(ratio * hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]"""
        return self.down_proj(F.gelu(self.up_proj(self.norm(x))))


class ResamplerLayer(nn.Module):
    """Attention and MLP, both added to the latents."""

    def __init__(self, config: ResamplerConfig, hidden_size: int) -> None:
        super().__init__()
        self.attention = ResamplerAttention(hidden_size, config.num_heads, config.head_dim, config.norm_eps)
        self.mlp = ResamplerMLP(hidden_size, config.mlp_ratio, config.norm_eps)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        """Media [N, P, W], latents [N, Q, W] -> [N, Q, W]"""
        latents = latents + self.attention(media, latents)
        return latents + self.mlp(latents)


class PerceiverResampler(nn.Module):
    """Features of an encoder to Q vectors of the decoder's hidden size. The latents have no position embedding."""

    def __init__(self, config: ResamplerConfig, encoder_hidden_size: int, decoder_hidden_size: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.num_latents, encoder_hidden_size))
        self.layers = nn.ModuleList(ResamplerLayer(config, encoder_hidden_size) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(encoder_hidden_size, eps=config.norm_eps)
        self.projection = nn.Linear(encoder_hidden_size, decoder_hidden_size)

    def forward(self, media: Tensor) -> Tensor:
        """[N, P, W] -> [N, Q, D]; N may be 0."""
        latents = self.latents.expand(media.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(media, latents)
        return self.projection(self.norm(latents))
