"""SigLIP's vision transformer, as AKI uses it: every layer, then the last LayerNorm; no pooling.

N images, P patches, W width, H heads, d head width. Equal to transformers' SiglipVisionModel (tests/parity).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.config.model import VisionConfig
from aki_megatron.model.full_attention import attend_all


class VisionAttention(nn.Module):
    """Every patch sees every patch; projections with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, W] -> [N, P, W]"""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(attend_all(q, k, v).transpose(1, 2).flatten(2))


class VisionFeedForward(nn.Module):
    """Two layers with the tanh form of GELU between them."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]"""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class VisionBlock(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = VisionAttention(config.hidden_size, config.num_heads)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = VisionFeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, W] -> [N, P, W]"""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: weights only.

    AKI reads the patch features, so nothing here is computed. The release holds these tensors, and so does a
    conversion of it.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_heads, batch_first=True)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.feed_forward = VisionFeedForward(config.hidden_size, config.intermediate_size)


class VisionEncoder(nn.Module):
    """Pixels to one feature per patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(
            torch.randn(config.patches, config.hidden_size) * config.hidden_size**-0.5
        )
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.pooling = PoolingHead(config) if config.pooling_head else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W], normalized, -> features [N, P, width] after the last LayerNorm."""
        weight = self.patch_embedding.weight
        x = self.patch_embedding(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        x = x + self.position_embedding
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
