"""Sizes that contradict each other are errors that say what to change."""

from typing import Any

import pytest

from aki_megatron.config.model import DecoderConfig, RopeConfig, VisionConfig
from aki_megatron.errors import ConfigError
from aki_megatron.families.phi3 import PHI35_MINI_ROPE


def test_default_decoder_is_phi_35_mini() -> None:
    decoder = DecoderConfig()
    assert decoder.rope == RopeConfig(**PHI35_MINI_ROPE)
    assert decoder.head_dim == 96
    assert len(decoder.rope.short_factor) == len(decoder.rope.long_factor) == 48
    for factors, ends in ((decoder.rope.short_factor, (1.0, 2.84)), (decoder.rope.long_factor, (1.08, 64.84))):
        assert list(factors) == sorted(factors)
        assert (factors[0], factors[-1]) == pytest.approx(ends, rel=1e-6)
    assert VisionConfig().num_patches == 729


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size=100 cannot be divided into model.decoder.num_heads=3"),
        ({"num_kv_heads": 5}, "num_heads=4 cannot be divided into model.decoder.num_kv_heads=5"),
        ({"hidden_size": 12}, "head_dim=3 .* must be even"),
        ({"head_dim": 5}, "head_dim=5 .* must be even"),
        ({"vocab_size": 63}, "vocab_size . num_added_tokens = 65 exceeds padded_vocab_size=64"),
        ({"rope": RopeConfig(**PHI35_MINI_ROPE)}, "short_factor has 48 values, head_dim=8 needs 4.*rope_type: default"),
    ],
)
def test_decoder(changed: dict[str, Any], named: str) -> None:
    values = {
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "padded_vocab_size": 64,
        "vocab_size": 60,
        "rope": RopeConfig(),
    }
    DecoderConfig(**values)
    with pytest.raises(ConfigError, match=named):
        DecoderConfig(**(values | changed))


def test_a_head_dim_of_its_own() -> None:
    decoder = DecoderConfig(hidden_size=30, num_heads=4, num_kv_heads=2, head_dim=16, rope=RopeConfig())
    assert (decoder.head_dim, decoder.attention_size) == (16, 64)
    assert DecoderConfig(**decoder.model_dump()) == decoder
    assert DecoderConfig().model_dump()["head_dim"] == 96  # written out resolved


def test_rope() -> None:
    with pytest.raises(ConfigError, match="rope_type=default, which uses none"):
        RopeConfig(short_factor=(1.0,))
    with pytest.raises(ConfigError, match="original_max_position_embeddings=9000"):
        RopeConfig(rope_type="longrope", original_max_position_embeddings=9000)


def test_vision() -> None:
    with pytest.raises(ConfigError, match="hidden_size=30 cannot be divided into model.vision.num_heads=4"):
        VisionConfig(hidden_size=30, num_heads=4)
    with pytest.raises(ConfigError, match="image_size=8 is smaller than one patch, patch_size=14"):
        VisionConfig(image_size=8)
