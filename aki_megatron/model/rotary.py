"""Rotary position embedding (Su et al., 2021): default, longrope as in Phi-3, and llama3; computed in fp32.

B sequences, T positions, H heads, d head dim.
"""

import math

import torch
from torch import Tensor

from aki_megatron.config.model import RopeConfig
from aki_megatron.types import NO_SEGMENT


class Rotary:
    """Cosines and sines of the angles by which queries and keys are rotated.

    Not a module: its frequencies stay fp32 when the model is cast, and are neither trained nor saved.
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
        """Return cosines and sines, each [B, T, 1, d / 2] in ``dtype``, for position and segment ids [B, T].

        With longrope a segment longer than ``original_max_position_embeddings`` takes the long factors at all its
        positions, whatever else is in the batch.
        """
        short, long = self._inverse_frequencies(position_ids.device)
        positions = position_ids.unsqueeze(-1).float()
        angles = positions * short
        if self.config.rope_type == "longrope":
            takes_long = self._in_long_segment(position_ids, segment_ids)
            if takes_long is not None:
                angles = torch.where(takes_long.unsqueeze(-1), positions * long, angles)
        angles = angles.unsqueeze(2)
        return (angles.cos() * self.scale).to(dtype), (angles.sin() * self.scale).to(dtype)

    def _in_long_segment(self, position_ids: Tensor, segment_ids: Tensor) -> Tensor | None:
        """Return which positions [B, T] are in a segment longer than the original maximum; None if none is."""
        limit = self.config.original_max_position_embeddings
        if 1 < position_ids.shape[1] <= limit:
            # positions restart in every segment; a single token may be a decode step at any position
            return None
        past_limit = (position_ids >= limit) & (segment_ids != NO_SEGMENT)
        if not bool(past_limit.any()):
            return None
        # segments are numbered from 0; slot 0 collects the padding, which is never past the limit
        slots = (segment_ids + 1).long()
        is_long = torch.zeros(len(slots), int(slots.max()) + 1, dtype=torch.int32, device=slots.device)
        return is_long.scatter_reduce(1, slots, past_limit.int(), "amax").gather(1, slots).bool()

    def _inverse_frequencies(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the inverse frequencies [d / 2] by short and long factors; equal where there are no factors."""
        if device not in self._frequencies:
            exponents = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
            periods = self.config.theta**exponents
            factors = [
                torch.tensor(factor or (1.0,), dtype=torch.float32, device=device)
                for factor in (self.config.short_factor, self.config.long_factor)
            ]
            short, long = (1.0 / (factor * periods) for factor in factors)
            self._frequencies[device] = (
                (self._llama3_scaled(short), long) if self.config.rope_type == "llama3" else (short, long)
            )
        return self._frequencies[device]

    def _llama3_scaled(self, frequencies: Tensor) -> Tensor:
        """Divide low frequencies by ``factor``, keep high ones, and interpolate between them (LLaMA 3.1)."""
        config = self.config
        num_periods = config.original_max_position_embeddings * frequencies / (2 * math.pi)
        blend = (num_periods - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * frequencies / config.factor + blend * frequencies


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (i, i + d/2) of x [B, T, H, d] by the angles of cos and sin [B, T, 1, d/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
