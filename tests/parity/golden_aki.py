"""Folder of the official release's recorded numbers (tests/golden/official_aki/README.md), and the model's sizes."""

from pathlib import Path

from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig

FOLDER = Path(__file__).parents[1] / "golden" / "official_aki"

CONFIG = ModelConfig(
    vision=VisionConfig(image_size=56, patch_size=14, hidden_size=48, num_layers=2, num_heads=4, intermediate_size=96),
    resampler=ResamplerConfig(num_latents=9),
    decoder=DecoderConfig(
        hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=4, intermediate_size=96, rope=RopeConfig()
    ),
)
