"""Folders and files that people take for models, buffers beside weights, and tokenizers of other models."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import GOLDEN, Run, done, refused
from safetensors.torch import load_file, save_file
from tiny_folders import language_folder
from torch import Tensor

from aki_megatron.checkpoint.hf_config import decoder_config
from aki_megatron.checkpoint.hf_folders import check_folder, language_source
from aki_megatron.checkpoint.shapes import model_shapes
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, VisionConfig
from aki_megatron.config.save import dump_model
from aki_megatron.data.tokenizer import grow_tokenizer
from aki_megatron.errors import CheckpointError, DataError
from aki_megatron.evaluate.golden_files import GoldenFolder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 5\n"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
SKIP = "--skip-logits-check"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model; tests change copies of it."""
    return language_folder(tmp_path_factory.mktemp("lm"), "Qwen3-8B")


@pytest.fixture
def copy(lm: Path, tmp_path: Path) -> Path:
    return shutil.copytree(lm, tmp_path / "lm")


def add(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def change_config(folder: Path, values: dict[str, Any], part: str | None = None) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    (content[part] if part else content).update(values)
    path.write_text(json.dumps(content))


def adapter(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-8B", "peft_type": "LORA"}')
    save_file({LORA: torch.ones(2, 2)}, folder / "adapter_model.safetensors")
    return folder


def test_lora_adapters_are_named(lm: Path, siglip: Path, convert: Run, tmp_path: Path) -> None:
    peft, out = adapter(tmp_path / "peft"), tmp_path / "out"
    commands: tuple[tuple[object, ...], ...] = (
        ("from-hf", "--lm", peft, "--vision", siglip),
        ("from-hf", "--lm", lm, "--vision", peft),
        ("from-hf", "--aki", peft),
        ("from-official", peft),
        ("from-official", peft / "adapter_model.safetensors"),
    )
    for command in commands:
        message = refused(convert(*command, "--out", out), out)
        assert "LoRA adapter of PEFT" in message and "merge_and_unload()" in message
    assert "of the base model Qwen/Qwen3-8B" in refused(convert(*commands[0], "--out", out), out)
    code, _, errors = convert("inspect", peft / "adapter_model.safetensors")
    assert code == 2 and f"its first matrix is {LORA}" in errors
    beside = shutil.copytree(lm, tmp_path / "beside")  # config.json copied into an adapter's folder
    (beside / "model.safetensors").unlink()
    shutil.copy(peft / "adapter_config.json", beside)
    message = refused(convert("from-hf", "--lm", beside, "--vision", siglip, "--out", out), out)
    assert "LoRA adapter of PEFT" in message
    torch.save({LORA: torch.ones(2, 2)}, tmp_path / "lora.pt")
    assert "LoRA adapter" in refused(convert("from-official", tmp_path / "lora.pt", "--out", out), out)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_git_lfs_pointers_are_named(name: str, copy: Path, siglip: Path, convert: Run, tmp_path: Path) -> None:
    (copy / name).write_text(POINTER)
    message = refused(convert("from-hf", "--lm", copy, "--vision", siglip, "--out", tmp_path / "out"), tmp_path / "out")
    assert name in message and "a git-lfs pointer" in message and "git lfs pull" in message
    (tmp_path / "checkpoint_9.pt").write_text(POINTER)
    result = convert("from-official", tmp_path / "checkpoint_9.pt", "--out", tmp_path / "out")
    assert "checkpoint_9.pt is a git-lfs pointer" in refused(result, tmp_path / "out")


def test_error_pages_hub_caches_and_files(copy: Path, siglip: Path, convert: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def message(folder: Path) -> str:
        return refused(convert("from-hf", "--lm", folder, "--vision", siglip, "--out", out), out)

    assert "model.safetensors is a file; give the folder" in message(copy / "model.safetensors")
    cache = tmp_path / "models--Qwen--Qwen3-8B"
    shutil.copytree(copy, cache / "snapshots" / "0123")
    assert f"is a cache of the hub; the model is in it: give {cache / 'snapshots' / '0123'}" in message(cache)
    (copy / "model.safetensors").write_text("<!doctype html><html>404</html>")
    assert "but HTML (an error page?)" in message(copy)
    (copy / "config.json").write_text("<html>404</html>")
    assert "config.json is not JSON" in message(copy) and "HTML (an error page?)" in message(copy)


def test_buffers_are_skipped_and_other_whole_numbers_refused_by_name(
    copy: Path, siglip: Path, convert: Run, tmp_path: Path
) -> None:
    encoder, out = shutil.copytree(siglip, tmp_path / "encoder"), tmp_path / "out"
    add(encoder / "model.safetensors", {"embeddings.position_ids": torch.arange(16)[None]})
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.position_ids": torch.arange(8, dtype=torch.int32),
        "model.layers.0.attn.bias": torch.ones(2, 2, dtype=torch.uint8),
    }
    add(copy / "model.safetensors", buffers)
    arguments = ("from-hf", "--lm", copy, "--vision", encoder, SKIP, "--out")
    done(convert(*arguments, out))
    records = json.loads((out / "conversion.json").read_text())["records"]
    skipped = {name for record in records if record["kind"] == "skipped" for name in record["source_names"]}
    assert skipped == {"embeddings.position_ids", *buffers}
    other = tmp_path / "other"
    add(copy / "model.safetensors", {"model.steps": torch.tensor([3])})
    assert "unexpected: model.steps (1,)" in refused(convert(*arguments, other), other)
    done(convert(*arguments, other, "--allow-unexpected", "model.steps"))
    weight, third = "model.layers.0.mlp.down_proj.weight", tmp_path / "third"
    add(copy / "model.safetensors", {weight: torch.ones(32, 48, dtype=torch.int64)})
    assert f"dtype: {weight} is stored as int64" in refused(convert(*arguments, third), third)
    config = decoder_config(copy, vocab_size=56, num_added_tokens=2)
    with pytest.raises(CheckpointError, match="down_proj.weight hold whole numbers"):
        check_folder(language_source(copy, config), *whole(config))
    for name, dtype in ((f"{weight[:-7]}.qweight", torch.int32), (weight, torch.int8), (weight, torch.float8_e4m3fn)):
        add(copy / "model.safetensors", {name: torch.ones(32, 48).to(dtype)})
        assert "Quantized folders are not read" in refused(convert(*arguments, third), third)


def whole(decoder: DecoderConfig) -> tuple[ModelConfig, dict[str, tuple[int, ...]]]:
    vision = VisionConfig(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=8)
    config = ModelConfig(vision=vision, resampler=ResamplerConfig(num_layers=1), decoder=decoder)
    return config, model_shapes(config)


LANGUAGE_FAULTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"hidden_size": "32"}, "hidden_size=32; it must be a whole number"),
    ({"hidden_size": None}, "hidden_size=null; it must be a whole number"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0; it must be a whole number above 0"),
    ({"num_attention_heads": 0}, "num_attention_heads=0; it must be a whole number above 0"),
    ({"num_key_value_heads": 3}, "num_heads=4 cannot be divided into model.decoder.num_kv_heads=3"),
    ({"intermediate_size": -1}, "intermediate_size=-1; it must be a whole number above 0"),
    ({"vocab_size": 1.5}, "vocab_size=1.5; it must be a whole number above 0"),
    ({"head_dim": "8"}, "head_dim=8; it must be a whole number above 0"),
    ({"head_dim": True}, "head_dim=True; it must be a whole number above 0"),
    ({"head_dim": 0}, "head_dim=0; it must be a whole number above 0"),
    ({"rms_norm_eps": 0}, "rms_norm_eps=0: Input should be greater than 0"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps=small: Input should be a valid number"),
    ({"max_position_embeddings": None}, "max_position_embeddings=null; it must be a whole number above 0"),
    ({"rope_parameters": None, "rope_theta": None}, "rope_theta=null; it must be a number above 0"),
    ({"rope_parameters": None, "rope_scaling": ["yarn"]}, "rope_scaling=['yarn']; it must be a JSON object"),
    ({"rope_parameters": {"rope_type": ["default"]}}, "rope_type=['default']; supported for qwen3: default"),
    ({"rope_parameters": {"full_attention": {"a": 1}}}, "unknown full_attention={'a': 1}"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings=null: Input should be a valid boolean"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings=false: Input should be a valid boolean"),
    ({"sliding_window": "32", "use_sliding_window": True}, "sliding_window=32; it must be a whole number or null"),
    ({"model_type": None}, "model_type=None; supported language models are"),
    ({"model_type": ["qwen3"]}, "model_type=['qwen3']; supported language models are"),
    ({"text_config": []}, "text_config=[]; it must be a JSON object"),
)
VISION_FAULTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"hidden_size": 0}, "hidden_size=0; it must be a whole number above 0"),
    ({"hidden_size": 30}, "hidden_size=30 cannot be divided into model.vision.num_heads=4"),
    ({"num_hidden_layers": 0}, "num_hidden_layers=0; it must be a whole number above 0"),
    ({"num_attention_heads": 0}, "num_attention_heads=0; it must be a whole number above 0"),
    ({"intermediate_size": None}, "intermediate_size=null; it must be a whole number above 0"),
    ({"image_size": 0}, "image_size=0; it must be a whole number above 0"),
    ({"image_size": [30, 30]}, "image_size=[30, 30]; it must be a whole number above 0"),
    ({"patch_size": 0}, "patch_size=0; it must be a whole number above 0"),
    ({"patch_size": 31}, "image_size=30 is smaller than one patch"),
    ({"layer_norm_eps": None}, "layer_norm_eps=null: Input should be a valid number"),
    ({"layer_norm_eps": -1}, "layer_norm_eps=-1: Input should be greater than 0"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu; only hidden_act=gelu_pytorch_tanh"),
    ({"vision_use_head": "yes"}, "vision_use_head=yes: Input should be a valid boolean"),
)


@pytest.mark.parametrize(("values", "expected"), LANGUAGE_FAULTS)
def test_every_fault_of_a_language_models_config_json(
    values: dict[str, Any], expected: str, copy: Path, siglip: Path, convert: Run, tmp_path: Path
) -> None:
    change_config(copy, values)
    out = tmp_path / "out"
    message = refused(convert("from-hf", "--lm", copy, "--vision", siglip, SKIP, "--out", out), out)
    assert str(copy / "config.json") in message and expected in message and "okenizer" not in message


@pytest.mark.parametrize(("values", "expected"), VISION_FAULTS)
def test_every_fault_of_siglips_config_json(
    values: dict[str, Any], expected: str, lm: Path, siglip: Path, convert: Run, tmp_path: Path
) -> None:
    encoder, out = shutil.copytree(siglip, tmp_path / "encoder"), tmp_path / "out"
    change_config(encoder, values)
    message = refused(convert("from-hf", "--lm", lm, "--vision", encoder, SKIP, "--out", out), out)
    assert str(encoder / "config.json") in message and expected in message


@pytest.mark.parametrize("values", [{"layer_types": ["a"]}, {"dtype": "foo"}, {"hidden_size": "x"}])
def test_faults_of_config_json_are_not_the_tokenizers(values: dict[str, Any], copy: Path, tmp_path: Path) -> None:
    """transformers reads config.json with the tokenizer, also for a run's data.tokenizer."""
    change_config(copy, values)
    with pytest.raises(DataError, match="config.json, which transformers reads with the tokenizer, has a fault"):
        grow_tokenizer(copy, tmp_path / "grown")
    (copy / "config.json").unlink()
    grow_tokenizer(copy, tmp_path / "grown")


def test_every_tensor_with_values_that_are_not_finite_is_named(
    copy: Path, siglip: Path, convert: Run, tmp_path: Path
) -> None:
    tensors, out = load_file(copy / "model.safetensors"), tmp_path / "out"
    norm, embedding = tensors["model.norm.weight"], tensors["model.embed_tokens.weight"]
    norm[1], embedding[60:64, 3] = float("nan"), float("-inf")
    add(copy / "model.safetensors", {"model.norm.weight": norm, "model.embed_tokens.weight": embedding})
    message = refused(convert("from-hf", "--lm", copy, "--vision", siglip, SKIP, "--out", out), out)
    for text in ("model.norm.weight", "1 of 32", "model.embed_tokens.weight", "4 NaN or infinite values of 2,304"):
        assert text in message
    release = tmp_path / "release.safetensors"
    shutil.copy(GOLDEN / "weights.safetensors", release)
    name = "lang_model.lm_head.bias"
    bias = load_file(release)[name]
    bias[5:7] = float("nan")
    add(release, {name: bias})
    (tmp_path / "model.yaml").write_text(dump_model(GoldenFolder(GOLDEN).config, AttentionConfig(rule="mma")))
    result = convert("from-official", release, "--model", tmp_path / "model.yaml", SKIP, "--out", out)
    assert f"{name} holds 2 NaN or infinite values of {bias.numel():,}" in refused(result, out)


def test_tokenizers_of_other_models_are_refused_everywhere(
    lm: Path, siglip: Path, convert: Run, tmp_path: Path
) -> None:
    phi, out = language_folder(tmp_path / "phi", "Phi-3.5-mini"), tmp_path / "out"
    (tmp_path / "model.yaml").write_text(dump_model(GoldenFolder(GOLDEN).config, AttentionConfig(rule="mma")))
    official = ("from-official", GOLDEN / "weights.safetensors", "--model", tmp_path / "model.yaml", SKIP, "--out", out)
    message = refused(convert(*official, "--tokenizer", lm), out)
    assert f"The tokenizer {lm} lacks the special tokens <s>, <|system|>" in message
    assert "the tokenizer" in refused(convert(*official, "--tokenizer", phi), out)  # of the family, of another size
    release = tmp_path / "release"
    shutil.copytree(lm, release)  # found beside the weights
    shutil.copy(GOLDEN / "weights.safetensors", release / "model.safetensors")
    message = refused(convert("from-official", release, *official[2:]), out)
    assert f"The tokenizer {release} lacks the special tokens" in message
    start, export = tmp_path / "start", tmp_path / "export"
    done(convert("from-hf", "--lm", lm, "--vision", siglip, SKIP, "--out", start))
    message = refused(convert("to-hf", start, "--tokenizer", phi, SKIP, "--out", out), out)
    assert f"The tokenizer {phi} lacks the special tokens <|im_start|>" in message
    done(convert("to-hf", start, SKIP, "--out", export))
    message = refused(convert("from-hf", "--aki", export, "--tokenizer", phi, SKIP, "--out", out), out)
    assert f"The tokenizer {phi} lacks" in message
    model = ("--model", tmp_path / "model.yaml")
    assert "Leave --model out" in refused(convert("from-hf", "--aki", export, *model, SKIP, "--out", out), out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(phi / name, export / name)
    assert "lacks the special tokens" in refused(convert("from-hf", "--aki", export, SKIP, "--out", out), out)


def test_a_run_grows_tables_for_added_tokens_only(lm: Path) -> None:
    config = decoder_config(lm, vocab_size=73, num_added_tokens=2)  # 72 rows, and a <pad> that AKI adds
    assert language_source(lm, config).growth_note == "from 72 to 128 rows"
    config = decoder_config(lm, vocab_size=74, num_added_tokens=2)
    with pytest.raises(CheckpointError, match="has 72 rows, the model has vocab_size=74 tokens besides AKI's"):
        language_source(lm, config)
