"""Training of the demo's encoder, and its folder as a SigLIP folder for transformers and for us."""

import json
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from transformers import AutoImageProcessor, SiglipVisionModel

from aki_megatron.checkpoint.initial_weights import load_pretrained
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig
from aki_megatron.data.image import decode_image, normalize
from aki_megatron.errors import UserError
from aki_megatron.model.stage import build_model
from aki_megatron.synthetic.dataset import DatasetSize, write_dataset
from aki_megatron.synthetic.encoder import (
    DEMO_ENCODER,
    EncoderRecipe,
    LabeledImages,
    cell_accuracy,
    load_labeled_images,
    train_encoder,
)
from aki_megatron.synthetic.questions import scene_caption
from aki_megatron.synthetic.scenes import COLORS, KINDS, sample_scene, scene_rng

TOOL = Path(__file__).parents[2] / "tools" / "train_encoder.py"
SIZE = DatasetSize(train_scenes=300, val_scenes=40, seed=3)

TINY = EncoderRecipe(steps=6, batch_size=16, warmup_steps=2)
"""Long enough to write a folder, too short to learn."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoder") / "data"
    write_dataset(root, SIZE, lambda done: None)
    return root


@pytest.fixture(scope="module")
def train_set(data: Path) -> LabeledImages:
    return load_labeled_images(data, "captions")


@pytest.fixture(scope="module")
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


@pytest.fixture(scope="module")
def folder(data: Path, tool: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folder") / "encoder"
    tool["run"](data, out, TINY, min_accuracy=0)
    return out


def test_labels_are_those_of_the_scenes(train_set: LabeledImages) -> None:
    assert len(train_set.images) == len(train_set.labels) == SIZE.train_scenes
    for number in range(0, SIZE.train_scenes, 37):
        scene = sample_scene(scene_rng(SIZE.seed, "train", number))
        expected = torch.zeros(9, 2, dtype=torch.int64)
        for item in scene.objects:
            cell = 3 * item.row + item.column
            expected[cell] = torch.tensor([1 + KINDS.index(item.kind), 1 + COLORS.index(item.color)])
        torch.testing.assert_close(train_set.labels[number], expected, msg=scene_caption(scene))


def test_training_learns_is_deterministic_and_keeps_the_random_state(train_set: LabeledImages) -> None:
    few = LabeledImages(train_set.images[:8], train_set.labels[:8])
    recipe = EncoderRecipe(steps=160, batch_size=8, warmup_steps=10)
    losses: list[float] = []
    before = torch.get_rng_state()
    encoder, head = train_encoder(few, DEMO_ENCODER, recipe, lambda step, loss: losses.append(loss))
    torch.testing.assert_close(torch.get_rng_state(), before)
    assert len(losses) == recipe.steps and losses[-1] < 0.1 * losses[0]
    assert cell_accuracy(encoder, head, few).cell > 0.9, "eight images are memorized"
    again, _ = train_encoder(few, DEMO_ENCODER, recipe, lambda step, loss: None)
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0, atol=0)


def test_accuracy_counts_correct_cells(train_set: LabeledImages) -> None:
    class Oracle(torch.nn.Module):
        """Predicts the labels, except the kind in the first cell of every image."""

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            kinds = F.one_hot(train_set.labels[: len(pixels), :, 0], len(KINDS) + 1).float()
            kinds[:, 0] = kinds[:, 0].roll(1, dims=-1)
            return kinds, F.one_hot(train_set.labels[: len(pixels), :, 1], len(COLORS) + 1).float()

    oracle = Oracle()
    found = cell_accuracy(torch.nn.Identity(), oracle, train_set)
    occupied = train_set.labels[..., 0] > 0
    assert found.color == 1.0 and found.cell == pytest.approx(8 / 9)
    assert found.kind == pytest.approx(1 - (occupied[:, 0].sum() / occupied.sum()).item())


def test_every_parameter_but_the_pooling_head_is_trained(train_set: LabeledImages) -> None:
    recipe = EncoderRecipe(steps=2, batch_size=8, warmup_steps=0)
    one, _ = train_encoder(train_set, DEMO_ENCODER, EncoderRecipe(1, 8, warmup_steps=0, lr=0.0), lambda *_: None)
    two, _ = train_encoder(train_set, DEMO_ENCODER, recipe, lambda *_: None)
    changed = {name for name, tensor in two.state_dict().items() if not torch.equal(tensor, one.state_dict()[name])}
    assert {name for name in one.state_dict() if not name.startswith("pooling_head.")} == changed


def test_the_folder_is_a_siglip_folder(folder: Path, data: Path) -> None:
    paths = sorted((data / "VQA/train2014").iterdir())[:12]
    pixels = normalize([decode_image(path, 36, key="") for path in paths], 36)
    external, report = SiglipVisionModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert all(name.startswith("vision_model.") for name in names) and "vision_model.head.probe" in names
    sizes = {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "padded_vocab_size": 16,
        "vocab_size": 14,
    }
    decoder = DecoderConfig(**sizes, num_added_tokens=2, rope=RopeConfig(rope_type="default"))
    resampler = ResamplerConfig(num_latents=4, num_layers=1, num_heads=2, head_dim=16)
    ours = build_model(
        ModelConfig(vision=DEMO_ENCODER, resampler=resampler, decoder=decoder), attention=AttentionConfig(rule="causal")
    )
    fresh = load_pretrained(ours, vision=folder)
    assert not [name for name in fresh if "vision" in name]
    with torch.no_grad():
        expected = external(pixel_values=pixels).last_hidden_state
        actual = ours.input_embedder.vision_encoder(pixels)
    assert expected.shape == (12, 36, DEMO_ENCODER.hidden_size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_the_folders_preprocessor_is_ours(folder: Path, data: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
    for path in sorted((data / "VQA/train2014").iterdir())[:5]:
        with Image.open(path) as image:
            external = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(normalize([decode_image(path, 36, key="")], 36)[0], external, rtol=0, atol=1e-6)


def test_a_second_run_does_nothing_and_another_recipe_trains_anew(
    tool: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "encoder"
    tool["run"](data, out, TINY, min_accuracy=0)
    first = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    tool["run"](data, out, TINY, min_accuracy=0)
    assert "complete, nothing to do" in capsys.readouterr().out
    tool["run"](data, out, replace(TINY, steps=7), min_accuracy=0)
    assert (out / "model.safetensors").read_bytes() != first
    assert json.loads((out / "training.json").read_text())["recipe"]["steps"] == 7


def test_only_other_captions_make_the_encoder_stale(
    tool: dict[str, Any], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    for name, complete in (("vsr/train-random.jsonl", True), ("captions/00000.tar", False)):
        tool["run"](copy, copy / "encoder", TINY, min_accuracy=0)
        manifest["sha256"][name] = "0" * 64
        (copy / "manifest.json").write_text(json.dumps(manifest))
        capsys.readouterr()
        tool["run"](copy, copy / "encoder", TINY, min_accuracy=0)
        assert ("complete, nothing to do" in capsys.readouterr().out) == complete


def test_an_encoder_of_too_low_accuracy_is_not_written(tool: dict[str, Any], data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"97% are required; train longer"):
        tool["run"](data, tmp_path / "encoder", TINY, min_accuracy=0.97)
    assert not (tmp_path / "encoder").exists()


def test_wrong_arguments_are_refused(
    tool: dict[str, Any],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    wrong = {
        ("--data", str(tmp_path), "--out", str(tmp_path / "encoder")): "run: python tools/make_data.py",
        ("--data", str(data), "--out", str(tmp_path)): "no encoder of this tool",
        ("--data", str(data), "--out", str(tmp_path / "encoder"), "--steps", "20"): "more than the warm-up",
    }
    for options, message in wrong.items():
        monkeypatch.setattr(sys, "argv", ["train_encoder", *options])
        assert tool["main"]() == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
