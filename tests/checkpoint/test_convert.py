"""tools/convert.py with Hugging Face folders: every backbone there and back bit for bit, and what the report says."""

import json
from pathlib import Path

import pytest
import torch
from conversions import Run, assert_equal, done, everything
from safetensors.torch import load_file
from tiny_folders import BACKBONES, language_folder
from torch import Tensor

from aki_megatron.checkpoint.checkpointer import SavedWeights
from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.checkpoint.initial_weights import load_weights
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.config.save import load_model
from aki_megatron.data.tokenizer import grow_tokenizer
from aki_megatron.model.stage import build_model


def stock_tensors(export: Path) -> dict[str, Tensor]:
    """The tensors of an exported folder that stock folders have, under their names there."""
    names = (("model.vision_tower.", ""), ("model.language_model.", "model."), ("lm_head.weight", "lm_head.weight"))
    return {
        theirs + name.removeprefix(start): tensor
        for path in export.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        for start, theirs in names
        if name.startswith(start)
    }


@pytest.mark.parametrize("backbone", BACKBONES)
def test_there_and_back_is_the_same_bit_for_bit(backbone: str, siglip: Path, convert: Run, tmp_path: Path) -> None:
    half, parts = backbone == "Qwen3-1.7B", backbone == "Qwen2.5-3B"
    lm = language_folder(
        tmp_path / "lm",
        backbone,
        dtype=torch.bfloat16 if half else torch.float32,
        shard="10KB" if parts else "5GB",
    )
    assert (len(list(lm.glob("*.safetensors"))) > 1) == parts
    start, export, back = tmp_path / "start", tmp_path / "export", tmp_path / "back"
    said = done(convert("from-hf", "--lm", lm, "--vision", siglip, "--out", start))
    assert "passed" in said and "front.resampler.latents" in said
    done(convert("to-hf", start, "--out", export, *(("--shard-gigabytes", 0.001) if parts else ())))
    assert (export / "model.safetensors.index.json").exists() == parts
    wanted = {name: tensor for path in lm.glob("*.safetensors") for name, tensor in load_file(path).items()}
    got = stock_tensors(export)
    if backbone == "LLaMA-3.2-3B":  # all its rows are tokens, so its table had to grow
        assert "grown" in said
        rows = got["model.embed_tokens.weight"]
        got["model.embed_tokens.weight"] = rows[:55]
        assert rows.shape == (64, 32) and rows[55:].std() == pytest.approx(0.02, rel=0.3)
    else:
        assert "grown" not in said
    assert_equal(got, wanted | load_file(siglip / "model.safetensors"))
    assert got["model.norm.weight"].dtype == (torch.bfloat16 if half else torch.float32)
    model = build_model(load_model(start / "step_000000" / "config.yaml")[0], rule="mma")
    load_weights(model, start)  # as a run does with init.weights
    weights = {f"weight.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    assert_equal(weights, {name: tensor.float() for name, tensor in everything(start).items()})
    done(convert("from-hf", "--aki", export, "--out", back))
    assert_equal(everything(back), everything(start))
    assert (back / "step_000000" / "config.yaml").read_text() == (start / "step_000000" / "config.yaml").read_text()
    tokenizer = "step_000000/tokenizer/tokenizer.json"
    assert (back / tokenizer).read_text() == (start / tokenizer).read_text()


def test_code_that_a_folder_brings_is_neither_run_nor_asked_about(
    siglip: Path, convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_folder(tmp_path / "lm", "Qwen3-8B")
    words = ("--skip-logits-check", "--out")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, *words, tmp_path / "start"))
    done(convert("to-hf", tmp_path / "start", *words, tmp_path / "export"))
    for file in (tmp_path / "export").glob("*.py"):
        file.write_text("raise SystemExit('run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    done(convert("from-hf", "--aki", tmp_path / "export", *words, tmp_path / "back"))
    assert grow_tokenizer(tmp_path / "export", tmp_path / "grown").image == 56


def test_ids_come_from_the_tokenizer_and_new_weights_are_those_of_a_run(
    siglip: Path, convert: Run, tmp_path: Path
) -> None:
    lm = language_folder(tmp_path / "lm", "Phi-3.5-mini")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, "--seed", 7, "--out", tmp_path / "start"))
    config, attention = load_model(tmp_path / "start" / "step_000000" / "config.yaml")
    # 54 words and <|endoftext|>, which cannot be padding too, so <pad> is 55
    assert (config.decoder.vocab_size, config.decoder.num_added_tokens, config.decoder.padded_vocab_size) == (56, 2, 64)
    assert attention.rule == "mma"
    words = json.loads((tmp_path / "start/step_000000/tokenizer/tokenizer.json").read_text())["added_tokens"]
    assert {word["content"]: word["id"] for word in words} == {
        "w0": 0,
        "<|endoftext|>": 54,
        "<pad>": 55,
        "<image>": 56,
        "<|endofchunk|>": 57,
    }
    new = dict(build_model(config, rule="mma", seed=7).named_parameters())
    saved = dict(SavedWeights(tmp_path / "start").read(new))
    for name, tensor in saved.items():
        drawn = name.startswith("front.resampler.") or name in (
            "front.embedding.extra",
            "head.output.bias",
            "head.extra.weight",
            "head.extra.bias",
        )
        assert drawn == torch.equal(tensor, new[name]), name


def test_the_report_names_every_tensor_and_every_file(siglip: Path, convert: Run, tmp_path: Path) -> None:
    lm = language_folder(tmp_path / "lm", "Qwen2.5-3B")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, "--out", tmp_path / "start"))
    report = json.loads((tmp_path / "start" / "conversion.json").read_text())
    read = [name for row in report["rows"] for name in row["read"]]
    assert sorted(read) == sorted([*open_safetensors(lm).facts, *open_safetensors(siglip).facts])
    wrote = [name for row in report["rows"] for name in row["wrote"]]
    assert sorted(wrote) == sorted(CheckpointSource(tmp_path / "start").facts)
    together = {row["wrote"][0]: row["read"] for row in report["rows"] if row["kind"] == "put together"}
    attention = "model.layers.1.self_attn"
    assert together["blocks.1.attention.qkv.bias"] == [f"{attention}.{part}_proj.bias" for part in "qkv"]
    assert "MMA mask active: passed" in report["facts"]["check"]
    files = {path for path in (tmp_path / "start").rglob("*") if path.is_file() and path.name != "conversion.json"}
    assert {tmp_path / "start" / name for name in report["outputs"]} == files
    said = done(convert("verify", tmp_path / "start"))
    assert f"{len(files)} of {len(files)} files are as they were written" in said
    table = tmp_path / "start" / "step_000000" / "__0_0.distcp"
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    for path in (tmp_path / "start", tmp_path / "start" / "step_000000"):
        code, printed, _ = convert("verify", path)
        assert code == 1 and "__0_0.distcp is corrupt" in printed
    (tmp_path / "start" / "conversion.json").write_text("{}")
    code, _, errors = convert("verify", tmp_path / "start")
    assert code == 2 and "conversion.json is corrupt" in errors
