"""The audio encoder equals transformers' WhisperEncoder with the same random weights, loaded from its folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel

from aki_megatron.checkpoint.hf_config import audio_config
from aki_megatron.checkpoint.initial_weights import load_pretrained
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import AudioConfig, DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.data.log_mel import LogMel
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.model.stage import Stage, build_model

AUDIO = AudioConfig(
    seconds=2, num_mel_bins=12, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
    resampler=ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, head_dim=8),
)  # fmt: skip
MODEL = ModelConfig(
    vision=VisionConfig(image_size=8, patch_size=4, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8),
    resampler=ResamplerConfig(num_latents=2, num_layers=1, num_heads=2, head_dim=4),
    decoder=DecoderConfig(
        hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, intermediate_size=16, padded_vocab_size=20,
        vocab_size=18, num_added_tokens=2, rope=RopeConfig(rope_type="default"),
    ),
    audio=AUDIO,
)  # fmt: skip


def whisper_config(**changed: Any) -> WhisperConfig:
    values = {
        "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": 12,
        "max_source_positions": 100, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 8,
        "vocab_size": 30, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "decoder_start_token_id": 1,
    }  # fmt: skip
    return WhisperConfig(**values | changed)


def random_whisper(kind: type, **changed: Any) -> Any:
    torch.manual_seed(0)
    model = kind(whisper_config(**changed))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)  # norms and positions differ from their initial values too
    return model.eval()


def native(folder: Path) -> tuple[Stage, list[str]]:
    model = build_model(MODEL, attention=AttentionConfig(rule="mma"), seed=3)
    return model.eval(), load_pretrained(model, audio=folder)


@pytest.mark.parametrize("kind", [WhisperForConditionalGeneration, WhisperModel])
def test_the_encoder_equals_whispers(kind: type, tmp_path: Path) -> None:
    external = random_whisper(kind)
    external.save_pretrained(tmp_path)
    model, random = native(tmp_path)
    assert audio_config(tmp_path) == AUDIO.model_copy(update={"resampler": ResamplerConfig()})
    assert not any("audio_encoder" in name for name in random) and any("audio_resampler" in name for name in random)
    log_mel = torch.randn(3, 12, 200)
    with torch.no_grad():
        expected = external.get_encoder()(log_mel).last_hidden_state
        features = model.input_embedder.audio_encoder(log_mel)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        assert features.shape == (3, AUDIO.num_positions, 16)
        shifted = model.input_embedder.audio_encoder(log_mel.roll(1, dims=2))
    assert float((shifted - expected).abs().max()) > 0.1  # the comparison would notice


def test_a_folder_of_another_size_is_refused_with_every_difference(tmp_path: Path) -> None:
    random_whisper(WhisperModel, encoder_layers=1, num_mel_bins=16, max_source_positions=150).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="describes another model than the run") as caught:
        native(tmp_path)
    for line in ("model.audio.num_layers=2, the folder has encoder_layers=1",
                 "model.audio.num_mel_bins=12, the folder has num_mel_bins=16",
                 "model.audio.seconds=2, the folder has max_source_positions / 50=3"):  # fmt: skip
        assert line in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "bert", "model_type=bert; only model_type=whisper is supported"),
        ("activation_function", "relu", "activation_function=relu; only activation_function=gelu is supported"),
        ("max_source_positions", 99, "max_source_positions=99; only multiples of 50"),
    ],
)
def test_another_kind_of_encoder_is_refused(key: str, value: Any, message: str, tmp_path: Path) -> None:
    text = whisper_config().to_json_string().replace(
        f'"{key}": "{getattr(whisper_config(), key)}"', f'"{key}": "{value}"'
    ).replace(f'"{key}": {getattr(whisper_config(), key)},', f'"{key}": {value},')  # fmt: skip
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        audio_config(tmp_path)


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    random_whisper(WhisperModel).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.layers.1.fc1.bias"]
    tensors["encoder.conv1.weight"] = torch.zeros(16, 12, 5)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        native(tmp_path)
    assert "missing: encoder.layers.1.fc1.bias (24,)" in str(caught.value)
    assert "encoder.conv1.weight is (16, 12, 5), the model needs (16, 12, 3)" in str(caught.value)


def test_the_spectrogram_is_whispers_by_its_definition() -> None:
    """Windows of 400 samples every 160, power, mel bands, log10, at most 8 below the loudest, divided by 4."""
    config = AudioConfig(seconds=1, num_mel_bins=80)
    log_mel = LogMel(config)
    draw = np.random.default_rng(0)
    wave = (0.1 * draw.standard_normal(12_000)).astype(np.float32)
    padded = np.pad(np.pad(wave, (0, 4_000)), 200, mode="reflect").astype(np.float64)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    frames = np.stack([padded[start : start + 400] * window for start in range(0, 16_000, 160)])
    power = np.abs(np.fft.rfft(frames)) ** 2
    filters = log_mel._extractor.mel_filters
    expected = np.log10(np.maximum(power @ filters, 1e-10)).T
    expected = (np.maximum(expected, expected.max() - 8) + 4) / 4
    np.testing.assert_allclose(log_mel(wave), expected, rtol=0, atol=1e-4)
    assert filters.shape == (201, 80) and (filters.sum(axis=0) > 0).all()
