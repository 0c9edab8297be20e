"""Names and shapes of the full-size release, written down here from its published layout, not from our table."""

from pathlib import Path

import pytest
import torch
from golden_aki import CONFIG, FOLDER
from safetensors.torch import load_file, save_file
from torch import Tensor

from aki_megatron.checkpoint.official import match_official, official_names, open_official
from aki_megatron.checkpoint.shapes import model_shapes
from aki_megatron.config.model import ModelConfig
from aki_megatron.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, weight: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def vision_release() -> Shapes:
    dim, inner = 1152, 4304
    root = "vision_encoder"
    shapes: Shapes = linear(f"{root}.embeddings.patch_embedding", (dim, 3, 14, 14))
    shapes[f"{root}.embeddings.position_embedding.weight"] = (729, dim)
    for i in range(27):
        layer = f"{root}.encoder.layers.{i}"
        for part in ("q", "k", "v", "out"):
            shapes |= linear(f"{layer}.self_attn.{part}_proj", (dim, dim))
        shapes |= linear(f"{layer}.layer_norm1", (dim,)) | linear(f"{layer}.layer_norm2", (dim,))
        shapes |= linear(f"{layer}.mlp.fc1", (inner, dim)) | linear(f"{layer}.mlp.fc2", (dim, inner))
    shapes |= linear(f"{root}.post_layernorm", (dim,))
    shapes |= {
        f"{root}.head.probe": (1, 1, dim),
        f"{root}.head.attention.in_proj_weight": (3 * dim, dim),
        f"{root}.head.attention.in_proj_bias": (3 * dim,),
    }
    shapes |= linear(f"{root}.head.attention.out_proj", (dim, dim)) | linear(f"{root}.head.layernorm", (dim,))
    return shapes | linear(f"{root}.head.mlp.fc1", (inner, dim)) | linear(f"{root}.head.mlp.fc2", (dim, inner))


def tokenizer_release() -> Shapes:
    dim, root = 1152, "vision_tokenizer"
    shapes: Shapes = {f"{root}.latents": (144, dim)} | linear(f"{root}.projection", (3072, dim))
    for i in range(6):
        layer = f"{root}.layers.{i}"
        shapes |= linear(f"{layer}.0.norm_media", (dim,)) | linear(f"{layer}.0.norm_latents", (dim,))
        shapes |= {
            f"{layer}.0.to_q.weight": (512, dim),
            f"{layer}.0.to_kv.weight": (1024, dim),
            f"{layer}.0.to_out.weight": (dim, 512),
            f"{layer}.1.1.weight": (4608, dim),
            f"{layer}.1.3.weight": (dim, 4608),
        }
        shapes |= linear(f"{layer}.1.0", (dim,))
    return shapes | linear(f"{root}.norm", (dim,))


def language_release() -> Shapes:
    dim, root = 3072, "lang_model"
    shapes: Shapes = {
        f"{root}.model.embed_tokens.weight": (32064, dim),
        f"{root}.model.embed_tokens.additional_embedding.weight": (2, dim),
        f"{root}.model.norm.weight": (dim,),
    }
    for i in range(32):
        layer = f"{root}.model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.qkv_proj.weight": (9216, dim),
            f"{layer}.self_attn.o_proj.weight": (dim, dim),
            f"{layer}.mlp.gate_up_proj.weight": (16384, dim),
            f"{layer}.mlp.down_proj.weight": (dim, 8192),
            f"{layer}.input_layernorm.weight": (dim,),
            f"{layer}.post_attention_layernorm.weight": (dim,),
        }
    return shapes | linear(f"{root}.lm_head", (32064, dim)) | linear(f"{root}.lm_head.additional_fc", (2, dim))


def test_every_tensor_of_the_release_has_a_native_name() -> None:
    release = vision_release() | tokenizer_release() | language_release()
    assert len(release) == 718
    table, native = official_names(ModelConfig()), model_shapes(ModelConfig())
    assert set(table) == set(native)
    assert sorted(table.values()) == sorted((name,) for name in release)
    assert {table[name][0]: shape for name, shape in native.items()} == release


def test_training_checkpoints_of_the_release_hold_270_tensors() -> None:
    table = official_names(ModelConfig(), vision=False)
    assert sorted(table.values()) == sorted((name,) for name in tokenizer_release() | language_release())
    assert len(table) == 270


def test_the_golden_release_matches_with_and_without_its_encoder(tmp_path: Path) -> None:
    source = open_official(FOLDER / "weights.safetensors")
    assert len(source.specs) == 144
    found = match_official(source, CONFIG)
    assert {name for names in found.table.values() for name in names} == set(source.specs) and not found.to_initialize
    rest = {name: tensor for name, tensor in load_file(source.path).items() if not name.startswith("vision_encoder.")}
    save_file(rest, tmp_path / "model.safetensors")
    assert set(match_official(open_official(tmp_path), CONFIG).table) == {
        name for name in found.table if not name.startswith("input_embedder.vision_encoder.")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lang_model.model.norm.weight": None}, "missing: lang_model.model.norm.weight"),
        ({"vision_encoder.post_layernorm.bias": None}, "missing: vision_encoder.post_layernorm.bias"),
        ({"lang_model.model.stray": torch.zeros(1)}, "unexpected: lang_model.model.stray"),
        ({"vision_tokenizer.latents": torch.zeros(8, 48)}, r"vision_tokenizer.latents is \(8, 48\).* \(9, 48\)"),
    ],
)
def test_a_release_of_another_model_is_refused(change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    tensors: dict[str, Tensor | None] = load_file(FOLDER / "weights.safetensors") | change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=message):
        match_official(open_official(tmp_path / "x.safetensors"), CONFIG)


def test_a_model_that_the_format_cannot_hold_is_refused() -> None:
    decoder = CONFIG.decoder.model_copy(update={"lm_head_bias": False})
    with pytest.raises(CheckpointError, match="lm_head_bias=False"):
        official_names(CONFIG.model_copy(update={"decoder": decoder}))
