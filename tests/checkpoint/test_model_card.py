"""The model card of an exported folder, and that nothing in the folder names a place on this machine."""

import json
import re
from io import BytesIO
from pathlib import Path

import pytest
import torch
import yaml
from convert_helpers import Run, done
from huggingface_hub import ModelCard
from PIL import Image
from tiny_folders import language_folder

from aki_megatron.checkpoint.model_card import draw_example, model_card
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.data import OFFICIAL_IMAGES, SYSTEM_MESSAGE, ImagesConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, RopeConfig
from aki_megatron.families.registry import FAMILIES

MMA = AttentionConfig(rule="mma")
DECODERS = {
    "Phi-3.5-mini": ("phi3", 3072, 32),
    "LLaMA-3.2-3B": ("llama", 3072, 28),
    "Qwen2.5-3B": ("qwen2", 2048, 36),
    "Qwen3-1.7B": ("qwen3", 2048, 28),
    "Qwen3-8B": ("qwen3", 4096, 36),
}
LICENCES = {
    "Phi-3.5-mini": ("microsoft/Phi-3.5-mini-instruct", {"license": "mit"}),
    "LLaMA-3.2-3B": ("meta-llama/Llama-3.2-3B-Instruct", {"license": "llama3.2"}),
    "Qwen2.5-3B": (
        "Qwen/Qwen2.5-3B-Instruct",
        {
            "license": "other",
            "license_name": "qwen-research",
            "license_link": "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE",
        },
    ),
    "Qwen3-1.7B": ("Qwen/Qwen3-1.7B", {"license": "apache-2.0"}),
    "Qwen3-8B": ("Qwen/Qwen3-8B", {"license": "apache-2.0"}),
}


def card(
    model: ModelConfig | None = None,
    attention: AttentionConfig = MMA,
    system_message: str = SYSTEM_MESSAGE,
    images: ImagesConfig = OFFICIAL_IMAGES,
) -> str:
    return model_card(model or ModelConfig(), attention, torch.bfloat16, system_message, images)


def front_matter(text: str) -> dict[str, object]:
    """The YAML between the first two lines of dashes, as the Hub reads it."""
    start, metadata, _ = text.split("---\n", 2)
    assert start == ""
    parsed = yaml.safe_load(metadata)
    assert ModelCard(text).data.to_dict() == parsed
    return dict(parsed)


@pytest.mark.parametrize("name", DECODERS)
def test_published_models_are_named_with_their_licences(name: str) -> None:
    family, hidden_size, num_layers = DECODERS[name]
    decoder = DecoderConfig(family=family, hidden_size=hidden_size, num_layers=num_layers, rope=RopeConfig())
    text = card(ModelConfig(decoder=decoder))
    hub_id, licence = LICENCES[name]
    assert front_matter(text) == {
        **licence,
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "base_model": [hub_id, "google/siglip-so400m-patch14-384"],
        "tags": ["aki", "siglip", "perceiver-resampler", "custom_code"],
    }
    assert f"[{hub_id}](https://huggingface.co/{hub_id}) | {licence.get('license_name', licence['license'])}" in text


def test_the_card_of_aki_4b() -> None:
    text = card()
    for part in (
        "4,330,957,954 parameters (bfloat16)",
        "384 x 384 pixels, 27 layers",
        "144 positions per image",
        "phi3, 32 layers, hidden size 3072",
        SYSTEM_MESSAGE,
        "Attention rule `mma`: modality-mutual attention",
        "vLLM, SGLang, TGI, TensorRT-LLM, llama.cpp",
        "their mask for the prompt is causal",
        "Transparency is ignored. Photographs are not turned",
        'pipeline("image-text-to-text"',
        "apply_chat_template",
    ):
        assert part in text, part
    assert "$" not in text
    (first, *_) = re.findall("```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in first.splitlines() if line]) == 5


def test_the_card_of_a_model_that_is_not_known() -> None:
    decoder = DecoderConfig(family="qwen3", hidden_size=64, num_layers=2, rope=RopeConfig())
    vision = ModelConfig().vision.model_copy(update={"num_layers": 3})
    text = card(ModelConfig(decoder=decoder, vision=vision))
    found = front_matter(text)
    assert found["license"] == "other" and "base_model" not in found
    assert "# AKI with qwen3 of 2 layers" in text and text.count("none known") == 2


def test_the_card_says_what_the_run_was_trained_with() -> None:
    text = card(
        attention=AttentionConfig(rule="causal"),
        system_message="Be `brief`.\n```\n$HOME {{ x }}",
        images=ImagesConfig(transparency="white", exif_rotation=True),
    )
    front_matter(text)
    assert "  ````text\n  Be `brief`.\n  ```\n  $HOME {{ x }}\n  ````\n" in text
    assert "Transparent ones are laid on white. Photographs are turned" in text
    assert "Attention rule `causal`: every position attends to what precedes it." in text
    assert "llama.cpp" in text and "Under a causal mask" not in text
    assert "- System message: none\n" in card(system_message="")


def test_the_example_is_a_transparent_picture() -> None:
    image = Image.open(BytesIO(draw_example()))
    assert image.mode == "RGBA" and image.getpixel((0, 0)) == (0, 0, 0, 0)


def test_every_published_model_of_a_family_is_recognized_by_its_sizes() -> None:
    for family in FAMILIES.values():
        assert family.published
        for model in family.published:
            assert family.published_model(model.hidden_size, model.num_layers) == model
        assert family.published_model(1, 1) is None


def test_nothing_in_the_folder_names_a_place_on_this_machine(
    siglip: Path, convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_folder(tmp_path / "language_model_here", "Phi-3.5-mini")
    flags = ("--skip-logits-check", "--out")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, *flags, tmp_path / "start"))
    monkeypatch.chdir(tmp_path)
    done(convert("to-hf", "start", "--out", tmp_path / "export"))
    done(convert("to-hf", tmp_path / "start", "--tokenizer", lm, *flags, tmp_path / "given"))
    done(convert("to-official", tmp_path / "start", *flags, tmp_path / "official"))
    for folder in ("export", "given", "official"):
        files = [path for path in (tmp_path / folder).rglob("*") if path.is_file()]
        assert files
        for path in files:
            content = path.read_bytes()
            assert not [place for place in (tmp_path, siglip, lm.name) if str(place).encode() in content], path
    report = json.loads((tmp_path / "export" / "conversion.json").read_text())
    assert report["sources"]["checkpoint"] == "step_000000"
    assert len(report["sources"]["sha256 of its manifest.json"]) == 64
    present = {path.name for path in (tmp_path / "export").iterdir()}
    assert present >= {"README.md", "example.png", "preprocessor_config.json", "processor_config.json"}
    assert present >= {"generation_config.json", "chat_template.jinja", "image_processing_aki.py"}
