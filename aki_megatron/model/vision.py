"""SigLIP's vision transformer (Zhai et al., 2023) as AKI uses it: all layers, then the final LayerNorm; no pooling.

N images, P patches, W vision hidden size, H heads, d head dim. Equal to transformers' SiglipVisionModel (tests/parity).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.config.model import VisionConfig
from aki_megatron.model.full_attention import full_attention


class VisionAttention(nn.Module):
    """Full attention between the patches of an image; projections with biases."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, W] -> [N, P, W]"""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(full_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Two linear layers with the tanh approximation of GELU between them."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]"""
        return self.down_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, P, W] -> [N, P, W]"""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PoolingHead(nn.Module):
    """SigLIP's attention pooling: weights only.

    AKI uses the patch features, so this is never computed. The official release holds these tensors, and so do our
    conversions of it.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = nn.MultiheadAttention(config.hidden_size, config.num_heads, batch_first=True)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)


class VisionEncoder(nn.Module):
    """Pixels to one feature vector per patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.position_embedding = nn.Parameter(
            torch.randn(config.num_patches, config.hidden_size) * config.hidden_size**-0.5
        )
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.pooling_head = PoolingHead(config) if config.pooling_head else None

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalized pixels [N, 3, H, W] -> features [N, P, W] after the final LayerNorm."""
        weight = self.patch_embedding.weight
        x = self.patch_embedding(pixels.to(weight.dtype)).flatten(2).transpose(1, 2)
        x = x + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
