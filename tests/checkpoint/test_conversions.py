"""tools/convert.py with Hugging Face folders: every backbone round-trips bit for bit, and the report is complete."""

import json
from pathlib import Path

import pytest
import torch
from convert_helpers import Run, all_tensors, assert_equal, done
from safetensors.torch import load_file
from tiny_folders import BACKBONES, language_folder
from torch import Tensor

from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.checkpoint.initial_weights import load_weights
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.save import load_model
from aki_megatron.data.tokenizer import grow_tokenizer
from aki_megatron.model.stage import build_model


def stock_tensors(export: Path) -> dict[str, Tensor]:
    """The tensors of an exported folder that stock folders have, under their names there."""
    prefixes = (("model.vision_tower.", ""), ("model.language_model.", "model."), ("lm_head.weight", "lm_head.weight"))
    return {
        stock_prefix + name.removeprefix(prefix): tensor
        for path in export.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        for prefix, stock_prefix in prefixes
        if name.startswith(prefix)
    }


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_round_trips_bit_for_bit(backbone: str, siglip: Path, convert: Run, tmp_path: Path) -> None:
    half, sharded = backbone == "Qwen3-1.7B", backbone == "Qwen2.5-3B"
    lm = language_folder(
        tmp_path / "lm",
        backbone,
        dtype=torch.bfloat16 if half else torch.float32,
        shard="10KB" if sharded else "5GB",
    )
    assert (len(list(lm.glob("*.safetensors"))) > 1) == sharded
    start, export, back = tmp_path / "start", tmp_path / "export", tmp_path / "back"
    printed = done(convert("from-hf", "--lm", lm, "--vision", siglip, "--out", start))
    assert "passed" in printed and "input_embedder.resampler  (71 tensors)" in printed
    assert len(printed.splitlines()) < 20, "the whole report is in conversion.json"
    printed_too = done(convert("to-hf", start, "--out", export, *(("--shard-gigabytes", 0.001) if sharded else ())))
    assert "continues 3 prompts, two with an image, with the 36 tokens that ours does" in printed_too
    assert (export / "model.safetensors.index.json").exists() == sharded
    expected = {name: tensor for path in lm.glob("*.safetensors") for name, tensor in load_file(path).items()}
    got = stock_tensors(export)
    if backbone == "LLaMA-3.2-3B":  # all its rows are tokens, so its embedding had to be extended
        assert "extended" in printed
        rows = got["model.embed_tokens.weight"]
        got["model.embed_tokens.weight"] = rows[:55]
        assert rows.shape == (64, 32) and rows[55:].std() == pytest.approx(0.02, rel=0.3)
    else:
        assert "extended" not in printed
    assert_equal(got, expected | load_file(siglip / "model.safetensors"))
    assert got["model.norm.weight"].dtype == (torch.bfloat16 if half else torch.float32)
    model = build_model(load_model(start / "step_000000" / "config.yaml")[0], attention=AttentionConfig(rule="mma"))
    load_weights(model, start)  # as a run does with init.weights
    weights = {f"weight.{name}": tensor.detach() for name, tensor in model.named_parameters()}
    assert_equal(weights, {name: tensor.float() for name, tensor in all_tensors(start).items()})
    done(convert("from-hf", "--aki", export, "--out", back))
    assert_equal(all_tensors(back), all_tensors(start))
    assert (back / "step_000000" / "config.yaml").read_text() == (start / "step_000000" / "config.yaml").read_text()
    tokenizer = "step_000000/tokenizer/tokenizer.json"
    assert (back / tokenizer).read_text() == (start / tokenizer).read_text()


def test_code_in_a_folder_is_neither_run_nor_prompted_for(
    siglip: Path, convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_folder(tmp_path / "lm", "Qwen3-8B")
    flags = ("--skip-logits-check", "--out")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, *flags, tmp_path / "start"))
    done(convert("to-hf", tmp_path / "start", *flags, tmp_path / "export"))
    for file in (tmp_path / "export").glob("*.py"):
        file.write_text("raise SystemExit('run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("prompted"))
    done(convert("from-hf", "--aki", tmp_path / "export", *flags, tmp_path / "back"))
    assert grow_tokenizer(tmp_path / "export", tmp_path / "grown").image_id == 56


def test_ids_come_from_the_tokenizer_and_random_weights_are_those_of_a_run(
    siglip: Path, convert: Run, tmp_path: Path
) -> None:
    lm = language_folder(tmp_path / "lm", "Phi-3.5-mini")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, "--seed", 7, "--out", tmp_path / "start"))
    config, attention = load_model(tmp_path / "start" / "step_000000" / "config.yaml")
    # 54 words and <|endoftext|>, which cannot be padding too, so <pad> is 55
    assert (config.decoder.vocab_size, config.decoder.num_added_tokens, config.decoder.padded_vocab_size) == (56, 2, 64)
    assert attention.rule == "mma"
    tokens = json.loads((tmp_path / "start/step_000000/tokenizer/tokenizer.json").read_text())["added_tokens"]
    assert {token["content"]: token["id"] for token in tokens} == {
        "w0": 0,
        **{
            name: number
            for number, name in enumerate(("<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), 49)
        },
        "<|endoftext|>": 54,
        "<pad>": 55,
        "<image>": 56,
        "<|endofchunk|>": 57,
    }
    new = dict(build_model(config, attention=AttentionConfig(rule="mma"), seed=7).named_parameters())
    source = CheckpointSource(tmp_path / "start")
    assert source.specs.keys() == new.keys()
    for name in source.specs:
        random = name.startswith("input_embedder.resampler.") or name in (
            "input_embedder.token_embedding.added_tokens",
            "lm_head.base.bias",
            "lm_head.added_tokens.weight",
            "lm_head.added_tokens.bias",
        )
        assert random == torch.equal(source.get(name), new[name]), name


def test_the_report_names_every_tensor_and_every_file(siglip: Path, convert: Run, tmp_path: Path) -> None:
    lm = language_folder(tmp_path / "lm", "Qwen2.5-3B")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, "--out", tmp_path / "start"))
    report = json.loads((tmp_path / "start" / "conversion.json").read_text())
    source_names = [name for record in report["records"] for name in record["source_names"]]
    assert sorted(source_names) == sorted([*open_safetensors(lm).specs, *open_safetensors(siglip).specs])
    target_names = [name for record in report["records"] for name in record["target_names"]]
    assert sorted(target_names) == sorted(CheckpointSource(tmp_path / "start").specs)
    concatenated = {
        record["target_names"][0]: record["source_names"]
        for record in report["records"]
        if record["kind"] == "concatenated"
    }
    attention = "model.layers.1.self_attn"
    assert concatenated["layers.1.attention.qkv_proj.bias"] == [f"{attention}.{part}_proj.bias" for part in "qkv"]
    assert "MMA mask active: passed" in report["notes"]["check"]
    files = {path for path in (tmp_path / "start").rglob("*") if path.is_file() and path.name != "conversion.json"}
    assert {tmp_path / "start" / name for name in report["outputs"]} == files
    printed = done(convert("verify", tmp_path / "start"))
    assert f"{len(files)} of {len(files)} files are intact" in printed
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
