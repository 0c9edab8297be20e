"""Rotary angles, compared with their definition."""

import math

import pytest
import torch

from aki_megatron.config.model import RopeConfig
from aki_megatron.families.phi3 import PHI35_MINI_ROPE
from aki_megatron.model.rotary import Rotary, apply_rotary

LONGROPE = RopeConfig(
    rope_type="longrope",
    max_position_embeddings=128,
    original_max_position_embeddings=8,
    short_factor=(1.0, 2.0),
    long_factor=(4.0, 5.0),
)


def angles(config: RopeConfig, head_dim: int, position: int, factors: tuple[float, ...]) -> list[float]:
    return [position / (factor * config.theta ** (2 * index / head_dim)) for index, factor in enumerate(factors)]


def test_default_rotates_pairs_half_a_head_apart() -> None:
    rotary = Rotary(RopeConfig(theta=100.0), 4)
    positions = torch.tensor([[0, 1, 7]], dtype=torch.int32)
    cos, sin = rotary(positions, torch.zeros_like(positions), torch.float64)
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    rotated = apply_rotary(x, cos, sin)
    for index, position in enumerate((0, 1, 7)):
        for pair, angle in enumerate(angles(rotary.config, 4, position, (1.0, 1.0))):
            first, second = x[0, index, :, pair], x[0, index, :, pair + 2]
            expected = first * math.cos(angle) - second * math.sin(angle)
            torch.testing.assert_close(rotated[0, index, :, pair], expected, rtol=0, atol=1e-6)
            expected = second * math.cos(angle) + first * math.sin(angle)
            torch.testing.assert_close(rotated[0, index, :, pair + 2], expected, rtol=0, atol=1e-6)


def test_longrope_factors_are_chosen_by_segment() -> None:
    """Two segments packed in one sequence: the one longer than 8 takes the long factors at all its positions."""
    rotary = Rotary(LONGROPE, 4)
    positions = torch.cat([torch.arange(9), torch.arange(8), torch.zeros(2)])[None].int()
    segments = torch.tensor([[0] * 9 + [1] * 8 + [-1] * 2], dtype=torch.int32)
    cos, _ = rotary(positions, segments, torch.float32)
    scale = math.sqrt(1 + math.log(128 / 8) / math.log(8))
    for index in range(17):
        factors = LONGROPE.long_factor if index < 9 else LONGROPE.short_factor
        expected = [math.cos(angle) * scale for angle in angles(LONGROPE, 4, int(positions[0, index]), factors)]
        torch.testing.assert_close(cos[0, index, 0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_a_single_generated_token_far_out_takes_the_long_factors() -> None:
    rotary = Rotary(LONGROPE, 4)
    positions = torch.tensor([[8], [7]], dtype=torch.int32)
    cos, _ = rotary(positions, torch.zeros_like(positions), torch.float32)
    scale = rotary.scale
    for index, (position, factors) in enumerate(((8, LONGROPE.long_factor), (7, LONGROPE.short_factor))):
        expected = [math.cos(angle) * scale for angle in angles(LONGROPE, 4, position, factors)]
        torch.testing.assert_close(cos[index, 0, 0], torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_llama3_scales_low_frequencies_only() -> None:
    config = RopeConfig(
        rope_type="llama3", theta=10000.0, max_position_embeddings=1024, original_max_position_embeddings=256,
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    )  # fmt: skip
    rotary = Rotary(config, 16)
    positions = torch.tensor([[1]], dtype=torch.int32)
    _, sin = rotary(positions, torch.zeros_like(positions), torch.float64)
    kinds = []
    for index in range(8):
        wave = 2 * math.pi * 10000.0 ** (2 * index / 16)  # positions per period
        if wave < 256 / 4:
            kinds.append("fast")
            blend = 1.0
        elif wave > 256:
            kinds.append("slow")
            blend = 0.0
        else:
            kinds.append("between")
            blend = (256 / wave - 1) / (4 - 1)
        frequency = 2 * math.pi / wave * ((1 - blend) / 8 + blend)
        assert float(sin[0, 0, 0, index]) == pytest.approx(math.sin(frequency), rel=1e-5)
    assert set(kinds) == {"fast", "between", "slow"}


def test_scale_of_phi_35_mini() -> None:
    assert Rotary(RopeConfig(**PHI35_MINI_ROPE), 96).scale == pytest.approx(1.19024, abs=1e-5)
