"""tools/convert.py from-hf --audio: the encoder of Whisper beside SigLIP and a language model, compared in the end."""

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from convert_helpers import Run, done, refused
from tiny_folders import language_folder, roughened
from transformers import WhisperConfig, WhisperForConditionalGeneration

from aki_megatron.checkpoint import conversions
from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.checkpoint.tensors import LazyTensors
from aki_megatron.config.combinations import AUDIO_EXPORT_REFUSAL
from aki_megatron.config.save import load_model


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_folder(tmp_path_factory.mktemp("lm"), "Qwen3-8B")


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=12,
        max_source_positions=50, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=8, vocab_size=30,
        max_target_positions=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("whisper")
    roughened(WhisperForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def test_an_encoder_is_taken_and_compared(convert: Run, lm: Path, siglip: Path, whisper: Path, tmp_path: Path) -> None:
    out = tmp_path / "start"
    printed = done(convert("from-hf", "--lm", lm, "--vision", siglip, "--audio", whisper, "--out", out))
    assert "logits check, MMA mask active: passed" in printed
    not_compared = printed.partition("not compared")[2]
    assert "audio_resampler" in not_compared and "audio_encoder" not in not_compared
    checkpoint = out / "step_000000"
    audio = load_model(checkpoint / "config.yaml")[0].audio
    assert audio is not None and (audio.seconds, audio.num_layers, audio.num_mel_bins) == (1, 2, 12)
    source = CheckpointSource(checkpoint)
    stored = WhisperForConditionalGeneration.from_pretrained(whisper).get_encoder()
    weight = source.get("input_embedder.audio_encoder.layers.1.attention.k_proj.weight")
    assert torch.equal(weight, stored.layers[1].self_attn.k_proj.weight)
    listed = done(convert("inspect", checkpoint))
    assert "audio encoder" in listed and "audio resampler" in listed

    for command in ("to-hf", "to-official"):
        assert AUDIO_EXPORT_REFUSAL in refused(convert(command, out, "--out", tmp_path / command), tmp_path / command)


def test_the_comparison_notices_a_wrong_tensor(
    convert: Run, lm: Path, siglip: Path, whisper: Path, tmp_path: Path
) -> None:
    """Negative twin: one bias of the encoder that is written differs from the folder's."""
    name, to_native = "input_embedder.audio_encoder.layers.0.mlp.up_proj.bias", conversions.to_native

    def wrong(external, table):
        tensors = to_native(external, table)
        getters = {n: (lambda get=get, n=n: get() + 0.5 * (n == name)) for n, get in tensors.getters.items()}
        return LazyTensors(tensors.specs, getters)

    out = tmp_path / "start"
    with patch.object(conversions, "to_native", wrong):
        code, _, errors = convert("from-hf", "--lm", lm, "--vision", siglip, "--audio", whisper, "--out", out)
    assert code == 2 and "The logits of what was written and of its source differ" in errors and not out.exists()


def test_mistakes_are_explained(convert: Run, lm: Path, siglip: Path, whisper: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "Give --lm and --vision together" in refused(convert("from-hf", "--audio", whisper, "--out", out), out)
    swapped = convert("from-hf", "--lm", lm, "--vision", siglip, "--audio", siglip, "--out", out)
    assert "model_type=siglip_vision_model; only model_type=whisper is supported" in refused(swapped, out)
    done(convert("from-hf", "--lm", lm, "--vision", siglip, "--out", tmp_path / "deaf"))
    model = tmp_path / "deaf/step_000000/config.yaml"
    arguments = ("from-hf", "--lm", lm, "--vision", siglip, "--audio", whisper, "--model", model, "--out", out)
    assert "has no audio encoder, model.audio is null" in refused(convert(*arguments), out)
