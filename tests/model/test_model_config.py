"""Sizes that contradict each other are errors that say what to change."""

from typing import Any

import pytest

from aki_megatron.config.model import PHI35_MINI_ROPE, DecoderConfig, RopeConfig, VisionConfig
from aki_megatron.flow import ConfigError


def test_default_decoder_is_phi_35_mini() -> None:
    decoder = DecoderConfig()
    assert decoder.rope == PHI35_MINI_ROPE
    assert decoder.head_width == 96
    assert len(decoder.rope.short_factor) == len(decoder.rope.long_factor) == 48
    for factors, ends in ((decoder.rope.short_factor, (1.0, 2.84)), (decoder.rope.long_factor, (1.08, 64.84))):
        assert list(factors) == sorted(factors)
        assert (factors[0], factors[-1]) == pytest.approx(ends, rel=1e-6)
    assert VisionConfig().patches == 729


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"width": 100, "heads": 3}, "width=100 cannot be divided into model.decoder.heads=3"),
        ({"kv_heads": 5}, "heads=4 cannot be divided into model.decoder.kv_heads=5"),
        ({"width": 12}, "= 3 must be even"),
        ({"base_tokens": 63}, "base_tokens . extra_tokens = 65 exceeds vocab_rows=64"),
        ({"rope": PHI35_MINI_ROPE}, "short_factor has 48 values, a head width of 8 needs 4.*kind: default"),
    ],
)
def test_decoder(changed: dict[str, Any], named: str) -> None:
    values = {"width": 32, "heads": 4, "kv_heads": 2, "vocab_rows": 64, "base_tokens": 60, "rope": RopeConfig()}
    DecoderConfig(**values)
    with pytest.raises(ConfigError, match=named):
        DecoderConfig(**(values | changed))


def test_rope() -> None:
    with pytest.raises(ConfigError, match="kind=default, which uses none"):
        RopeConfig(short_factor=(1.0,))
    with pytest.raises(ConfigError, match="original_max_positions=9000"):
        RopeConfig(kind="longrope", original_max_positions=9000)


def test_vision() -> None:
    with pytest.raises(ConfigError, match="width=30 cannot be divided into model.vision.heads=4"):
        VisionConfig(width=30, heads=4)
    with pytest.raises(ConfigError, match="image_size=8 holds no patch of patch_size=14"):
        VisionConfig(image_size=8)
