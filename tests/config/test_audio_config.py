"""``model.audio``: a section that may be null, its flags, its checks, and files of before it."""

from pathlib import Path

import pytest
import yaml
from demo_runs import ROOT, load, message

from aki_megatron.checkpoint.hf_export import refuse_audio
from aki_megatron.config.combinations import AUDIO_EXPORT_REFUSAL, page
from aki_megatron.config.load import FLAGS, flag_texts
from aki_megatron.config.model import AudioConfig, ModelConfig
from aki_megatron.config.save import compare_for_resume, dump_run, load_saved
from aki_megatron.config.validation import values_of
from aki_megatron.errors import ConfigError
from aki_megatron.parallel.pipeline_partition import estimate_costs
from aki_megatron.train.main import missing_inputs

AUDIO_YAML = ROOT / "configs/demo/audio.yaml"


def test_without_it_there_is_no_audio() -> None:
    assert load().model.audio is None and ModelConfig().audio is None


def test_flags_set_keys_of_a_section_that_is_null() -> None:
    audio = load("--model.audio.seconds", "2", "--model.audio.resampler.num_latents", "5").model.audio
    assert audio is not None and (audio.seconds, audio.resampler.num_latents) == (2, 5)
    assert audio.hidden_size == AudioConfig().hidden_size
    assert load("--model.audio.seconds", "3", config=AUDIO_YAML).model.audio.num_mel_bins == 40


def test_every_key_has_a_flag_and_help() -> None:
    keys = [key for key in FLAGS if key.startswith("model.audio.")]
    assert "model.audio.resampler.num_latents" in keys and len(keys) == len(AudioConfig.model_fields) - 1 + 6
    assert all(FLAGS[key].description for key in keys)
    run = load()
    texts = flag_texts(values_of({name: getattr(run, name) for name in type(run).model_fields}))
    assert texts["model.audio.seconds"] == "null"


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--model.audio.second", "2"), "unknown flag --model.audio.second; did you mean --model.audio.seconds"),
        (("--model.audio.seconds", "0.5"), "model.audio.seconds must be a whole number > 0; got 0.5"),
        (("--model.audio.sample_rate", "8000"), "model.audio.sample_rate must be one of 16000; got 8000"),
        (("--model.audio.num_heads", "5"), "hidden_size=768 cannot be divided into model.audio.num_heads=5"),
        (("--model.audio.hidden_size", "1", "--model.audio.num_heads", "1"), "hidden_size=1 must be even"),
        (("--init.audio", "whisper"), "init.audio=whisper is for an audio encoder, but model.audio is null"),
        (("--model.audio.resampler.num_latents", "400"),
         "model.resampler.num_latents + model.audio.resampler.num_latents=409 = 537 positions exceed"),
        (("--model.audio.resampler.num_latents", "20", "--data.packing.enabled", "true",
          "--data.packing.sequence_length", "150"),
         "data.max_text_tokens + model.resampler.num_latents + model.audio.resampler.num_latents = 157"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(flags: tuple[str, ...], error: str) -> None:
    assert error in message(*flags)


def test_what_is_wrong_in_a_file_is_said(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for audio, error in (("3", "model.audio must be a mapping with the keys sample_rate, seconds"),
                         ("{secs: 3}", "unknown key model.audio.secs"), ("{seconds: a}", "got \"a\"")):  # fmt: skip
        file.write_text(f"base: {ROOT / 'configs/demo/sft.yaml'}\nmodel: {{audio: {audio}}}\n")
        assert error in message(config=file)


def test_a_folder_that_is_missing_is_named_at_the_start(tmp_path: Path) -> None:
    flags = ("--model.audio.seconds", "2", "--init.weights", "null", "--run.dir", str(tmp_path / "run"))
    assert "nowhere (init.audio)" in missing_inputs(load(*flags, "--init.audio", "nowhere"))


def test_runs_of_before_it_resume_as_before(tmp_path: Path) -> None:
    run = load()
    old = tmp_path / "config.yaml"
    values = yaml.safe_load(dump_run(run))
    del values["model"]["audio"], values["init"]["audio"]
    old.write_text(yaml.safe_dump(values))
    assert "audio" not in old.read_text()
    assert compare_for_resume(load_saved(old), run) == []
    changed = compare_for_resume(load_saved(old), load("--model.audio.seconds", "2"))
    assert changed and all(change.key.startswith("model.audio") for change in changed)


def test_a_model_with_audio_is_not_exported() -> None:
    with pytest.raises(ConfigError, match=AUDIO_EXPORT_REFUSAL):
        refuse_audio(load(config=AUDIO_YAML).model)
    refuse_audio(load().model)
    assert AUDIO_EXPORT_REFUSAL in page()


def test_the_partition_counts_the_audio_encoder() -> None:
    with_audio, without = (estimate_costs(load(config=path).model, text_tokens=20).input_embedder
                           for path in (AUDIO_YAML, ROOT / "configs/demo/sft.yaml"))  # fmt: skip
    plain = load(config=AUDIO_YAML).model.model_copy(update={"audio": None})
    assert with_audio > 1.5 * estimate_costs(plain, text_tokens=20).input_embedder and without > 0
