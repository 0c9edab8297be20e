"""Names and shapes of the full-size release, written down here from its published layout, not taken from our table."""

from pathlib import Path

import pytest
import torch
from golden_aki import CONFIG, FOLDER
from safetensors.torch import load_file, save_file
from torch import Tensor

from aki_megatron.checkpoint.official import match_official, official_names, open_official
from aki_megatron.checkpoint.weight_names import model_shapes
from aki_megatron.config.model import ModelConfig
from aki_megatron.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


def both(name: str, weight: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def vision_release() -> Shapes:
    width, inner = 1152, 4304
    root = "vision_encoder"
    shapes: Shapes = both(f"{root}.embeddings.patch_embedding", (width, 3, 14, 14))
    shapes[f"{root}.embeddings.position_embedding.weight"] = (729, width)
    for i in range(27):
        layer = f"{root}.encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            shapes |= both(f"{layer}.self_attn.{part}_proj", (width, width))
        shapes |= both(f"{layer}.layer_norm1", (width,)) | both(f"{layer}.layer_norm2", (width,))
        shapes |= both(f"{layer}.mlp.fc1", (inner, width)) | both(f"{layer}.mlp.fc2", (width, inner))
    shapes |= both(f"{root}.post_layernorm", (width,))
    shapes |= {
        f"{root}.head.probe": (1, 1, width),
        f"{root}.head.attention.in_proj_weight": (3 * width, width),
        f"{root}.head.attention.in_proj_bias": (3 * width,),
    }
    shapes |= both(f"{root}.head.attention.out_proj", (width, width)) | both(f"{root}.head.layernorm", (width,))
    return shapes | both(f"{root}.head.mlp.fc1", (inner, width)) | both(f"{root}.head.mlp.fc2", (width, inner))


def tokenizer_release() -> Shapes:
    width, root = 1152, "vision_tokenizer"
    shapes: Shapes = {f"{root}.latents": (144, width)} | both(f"{root}.projection", (3072, width))
    for i in range(6):
        layer = f"{root}.layers.{i}"
        shapes |= both(f"{layer}.0.norm_media", (width,)) | both(f"{layer}.0.norm_latents", (width,))
        shapes |= {
            f"{layer}.0.to_q.weight": (512, width),
            f"{layer}.0.to_kv.weight": (1024, width),
            f"{layer}.0.to_out.weight": (width, 512),
            f"{layer}.1.1.weight": (4608, width),
            f"{layer}.1.3.weight": (width, 4608),
        }
        shapes |= both(f"{layer}.1.0", (width,))
    return shapes | both(f"{root}.norm", (width,))


def language_release() -> Shapes:
    width, root = 3072, "lang_model"
    shapes: Shapes = {
        f"{root}.model.embed_tokens.weight": (32064, width),
        f"{root}.model.embed_tokens.additional_embedding.weight": (2, width),
        f"{root}.model.norm.weight": (width,),
    }
    for i in range(32):
        layer = f"{root}.model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.qkv_proj.weight": (9216, width),
            f"{layer}.self_attn.o_proj.weight": (width, width),
            f"{layer}.mlp.gate_up_proj.weight": (16384, width),
            f"{layer}.mlp.down_proj.weight": (width, 8192),
            f"{layer}.input_layernorm.weight": (width,),
            f"{layer}.post_attention_layernorm.weight": (width,),
        }
    return shapes | both(f"{root}.lm_head", (32064, width)) | both(f"{root}.lm_head.additional_fc", (2, width))


def test_every_tensor_of_the_release_has_one_of_ours() -> None:
    release = vision_release() | tokenizer_release() | language_release()
    assert len(release) == 718
    table, ours = official_names(ModelConfig()), model_shapes(ModelConfig())
    assert set(table) == set(ours)
    assert sorted(table.values()) == sorted((name,) for name in release)
    assert {table[name][0]: shape for name, shape in ours.items()} == release


def test_training_checkpoints_of_the_release_hold_270() -> None:
    table = official_names(ModelConfig(), vision=False)
    assert sorted(table.values()) == sorted((name,) for name in tokenizer_release() | language_release())
    assert len(table) == 270


def test_the_golden_release_fits_with_and_without_its_encoder(tmp_path: Path) -> None:
    source = open_official(FOLDER / "weights.safetensors")
    assert len(source.facts) == 144
    found = match_official(source, CONFIG)
    assert {name for names in found.table.values() for name in names} == set(source.facts) and not found.drawn
    rest = {name: tensor for name, tensor in load_file(source.path).items() if not name.startswith("vision_encoder.")}
    save_file(rest, tmp_path / "model.safetensors")
    assert set(match_official(open_official(tmp_path), CONFIG).table) == {
        name for name in found.table if not name.startswith("front.vision.")
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lang_model.model.norm.weight": None}, "missing: lang_model.model.norm.weight"),
        ({"vision_encoder.post_layernorm.bias": None}, "missing: vision_encoder.post_layernorm.bias"),
        ({"lang_model.model.stray": torch.zeros(1)}, "extra: lang_model.model.stray"),
        ({"vision_tokenizer.latents": torch.zeros(8, 48)}, r"vision_tokenizer.latents is \(8, 48\).* \(9, 48\)"),
    ],
)
def test_a_release_of_another_model_is_refused(change: dict[str, Tensor | None], named: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor | None] = load_file(FOLDER / "weights.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=named):
        match_official(open_official(tmp_path / "x.safetensors"), CONFIG)


def test_a_model_the_format_cannot_hold_is_refused() -> None:
    decoder = CONFIG.decoder.model_copy(update={"lm_head_bias": False})
    with pytest.raises(CheckpointError, match="lm_head_bias=False"):
        official_names(CONFIG.model_copy(update={"decoder": decoder}))
