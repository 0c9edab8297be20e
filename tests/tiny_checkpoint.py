"""A checkpoint of a tiny random model with a tokenizer, and the folder that it is exported to."""

from pathlib import Path

from aki_megatron.checkpoint.conversion_steps import ConversionSettings, ConvertedModel, open_checkpoint, write_weights
from aki_megatron.checkpoint.hf_export import export
from aki_megatron.checkpoint.random_init import RandomInitSource
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.data.tokenizer import grow_tokenizer

PHI3_LIKE = Path(__file__).parent / "data/phi3_like"


def write_tiny_checkpoint(folder: Path, *, max_positions: int = 512, seed: int = 3) -> Path:
    """Write FOLDER/step_000000; return its path."""
    tokenizer = folder / "grown_tokenizer"
    vocabulary = grow_tokenizer(PHI3_LIKE, tokenizer)
    config = ModelConfig(
        vision=VisionConfig(
            image_size=12, patch_size=4, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24
        ),
        resampler=ResamplerConfig(num_latents=4, num_layers=1, num_heads=2, head_dim=8),
        decoder=DecoderConfig(
            family="phi3",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            intermediate_size=48,
            padded_vocab_size=-(-(vocabulary.vocab_size + vocabulary.num_added_tokens) // 8) * 8,
            vocab_size=vocabulary.vocab_size,
            num_added_tokens=vocabulary.num_added_tokens,
            rope=RopeConfig(max_position_embeddings=max_positions),
        ),
    )
    model = ConvertedModel(config, AttentionConfig(rule="mma"))
    return write_weights(folder, RandomInitSource(config, seed), model, ConversionSettings(), tokenizer)


def export_tiny(checkpoint: Path, out: Path) -> Path:
    """Write the folder that transformers loads."""
    source, model = open_checkpoint(checkpoint)
    export(source, model.config, model.attention, checkpoint / "tokenizer", out)
    return out
