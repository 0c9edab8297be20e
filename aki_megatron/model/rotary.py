"""Rotary position embedding, plain, longrope (Phi-3's way) and llama3, computed in fp32.

B rows, T tokens, H heads, d head width.
"""

import math

import torch
from torch import Tensor

from aki_megatron.config.model import RopeConfig
from aki_megatron.types import NO_SEGMENT


class Rotary:
    """Cosines and sines of the angles by which queries and keys are turned.

    Not a module: its frequencies must stay fp32 when the model is cast, and are neither trained nor saved.
    """

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self.config = config
        self.head_dim = head_dim
        self.scale = 1.0
        if config.rope_type == "longrope":
            ratio = config.max_position_embeddings / config.original_max_position_embeddings
            self.scale = math.sqrt(1 + math.log(ratio) / math.log(config.original_max_position_embeddings))
        self._frequencies: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __call__(self, position_ids: Tensor, segment_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [B, T, 1, d / 2] in ``dtype``, from position and segment ids [B, T].

        With longrope a sequence longer than ``original_max_position_embeddings`` takes the long factors at all its places.
        A sequence is one segment of one row, so what else is in the batch does not matter.
        """
        short, long = self._on(position_ids.device)
        positions = position_ids.unsqueeze(-1).float()
        angles = positions * short
        if self.config.rope_type == "longrope":
            beyond = self._beyond(position_ids, segment_ids)
            if beyond is not None:
                angles = torch.where(beyond.unsqueeze(-1), positions * long, angles)
        angles = angles.unsqueeze(2)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)

    def _beyond(self, position_ids: Tensor, segment_ids: Tensor) -> Tensor | None:
        """Places [B, T] of sequences longer than the original maximum; None if there is none."""
        limit = self.config.original_max_position_embeddings
        if 1 < position_ids.shape[1] <= limit:
            return None  # positions restart in every segment; one token alone may be a generated one at any position
        past = (position_ids >= limit) & (segment_ids != NO_SEGMENT)
        if not bool(past.any()):
            return None
        # segments are numbered from 0; slot 0 collects the padding, which is never past the limit
        slots = (segment_ids + 1).long()
        longest = torch.zeros(len(slots), int(slots.max()) + 1, dtype=torch.int32, device=slots.device)
        return longest.scatter_reduce(1, slots, past.int(), "amax").gather(1, slots).bool()

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._frequencies:
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
            plain = self.config.theta**exponents
            factors = [
                torch.tensor(factor or (1.0,), dtype=torch.float32, device=device)
                for factor in (self.config.short_factor, self.config.long_factor)
            ]
            short, long = (1.0 / (factor * plain) for factor in factors)
            self._frequencies[device] = (
                (self._slowed(short), long) if self.config.rope_type == "llama3" else (short, long)
            )
        return self._frequencies[device]

    def _slowed(self, frequencies: Tensor) -> Tensor:
        """LLaMA 3.1's rule: slow waves a factor slower, fast ones as they are, a blend by the wavelength between."""
        config = self.config
        waves_seen = config.original_max_position_embeddings * frequencies / (2 * math.pi)
        fastness = (waves_seen - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        fastness = fastness.clamp(0, 1)
        return (1 - fastness) * frequencies / config.factor + fastness * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + d/2) of x [B, T, H, d] by the angles of cos and sin [B, T, 1, d/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
