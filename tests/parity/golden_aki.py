"""Where the official release's golden numbers lie (tests/golden/official_aki/README.md), and the sizes they have."""

from pathlib import Path

from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig

FOLDER = Path(__file__).parents[1] / "golden" / "official_aki"

CONFIG = ModelConfig(
    vision=VisionConfig(image_size=56, patch_size=14, width=48, layers=2, heads=4, mlp_width=96),
    resampler=ResamplerConfig(latents=9),
    decoder=DecoderConfig(width=64, layers=3, heads=4, kv_heads=4, mlp_width=96, rope=RopeConfig()),
)
