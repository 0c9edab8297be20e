"""Whisper's audio encoder (Radford et al., 2022): log-mel spectrogram to one feature vector per 20 ms.

N recordings, M mel bands, F frames, L = F / 2 features, W hidden size, H heads, d head dim. Equal to transformers'
WhisperEncoder (tests/parity).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aki_megatron.config.model import AudioConfig
from aki_megatron.model.full_attention import full_attention

MAX_TIMESCALE = 10000.0
"""Slowest wave of the position embedding, in positions per radian."""

RANDOM_SOUND_GAIN = 3.0
"""Of the second convolution's random initialization; without it the position is three times as large as the sound."""


class AudioAttention(nn.Module):
    """Full attention between the features of a recording; the key projection has no bias."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, W] -> [N, L, W]"""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(full_attention(q, k, v).transpose(1, 2).flatten(2))


class AudioMLP(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size)
        self.down_proj = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] -> [..., W]"""
        return self.down_proj(F.gelu(self.up_proj(x)))


class AudioLayer(nn.Module):
    """Attention and MLP, each with a LayerNorm before it and a residual around both."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = AudioAttention(config.hidden_size, config.num_heads)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = AudioMLP(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, W] -> [N, L, W]"""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class AudioEncoder(nn.Module):
    """Spectrograms to features. The position embedding is a parameter that starts, and in Whisper stays, sinusoidal."""

    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(config.num_mel_bins, config.hidden_size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.hidden_size, config.hidden_size, kernel_size=3, stride=2, padding=1)
        self.position_embedding = nn.Parameter(sinusoids(config.num_positions, config.hidden_size), requires_grad=False)
        # so that random features tell of the sound as much as of the position, whose embedding is added to them
        nn.init.kaiming_normal_(self.conv1.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(self.conv2.weight, nonlinearity="relu")
        self.conv2.weight.data.mul_(RANDOM_SOUND_GAIN)
        self.layers = nn.ModuleList(AudioLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, log_mel: Tensor) -> Tensor:
        """Log-mel spectrograms [N, M, F] -> features [N, L, W] after the final LayerNorm; N may be 0."""
        x = F.gelu(self.conv1(log_mel.to(self.conv1.weight.dtype)))
        x = F.gelu(self.conv2(x)).transpose(1, 2) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def sinusoids(length: int, width: int) -> Tensor:
    """Return Whisper's position embedding [length, width]: sines of the position, then cosines, of falling speed."""
    speeds = torch.exp(torch.arange(width // 2) * (-math.log(MAX_TIMESCALE) / (width // 2 - 1)))
    angles = torch.arange(length)[:, None] * speeds
    return torch.cat([angles.sin(), angles.cos()], dim=1)
