"""Errors of tools/convert.py: each wrong input gets one message, and nothing is left of the output."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from convert_helpers import Run, done, refused
from safetensors.torch import load_file, save_file
from tiny_folders import language_folder
from torch import Tensor

from aki_megatron.checkpoint import conversions as conversions_module
from aki_megatron.checkpoint.conversion_report import matches_any
from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.checkpoint.random_init import RandomInitSource
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.save import dump_model, load_model

NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model in several shards."""
    return language_folder(tmp_path_factory.mktemp("lm"), "Qwen3-1.7B", shard="10KB")


def changed(folder: Path, to: Path, change: dict[str, Tensor | None]) -> Path:
    """A copy in one file with tensors added, replaced or (None) removed."""
    tensors: dict[str, Tensor | None] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    tensors |= change
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, to / "model.safetensors")
    return to


def without_a_shard(folder: Path) -> None:
    next(folder.glob("model-00002-*")).unlink()


def only_a_pickle(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    file = next(folder.glob("model-00002-*"))
    file.write_bytes(file.read_bytes()[:-7])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def another_family(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"model_type": "gemma"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_shard, "these are missing: model-00002"),
        (only_a_pickle, "Pickle files (pytorch_model.bin) are not read"),
        (cut_off, "not fully covered"),
        (no_tokenizer, "has no tokenizer.json"),
        (another_family, "model_type=gemma"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    ],
)
def test_a_damaged_language_model(
    damage: Callable[[Path], None], message: str, lm: Path, siglip: Path, convert: Run, tmp_path: Path
) -> None:
    folder = shutil.copytree(lm, tmp_path / "lm")
    damage(folder)
    result = convert("from-hf", "--lm", folder, "--vision", siglip, "--out", tmp_path / "out")
    assert message in refused(result, tmp_path / "out")


def test_swapped_folders_and_incomplete_commands(lm: Path, siglip: Path, convert: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    swapped = convert("from-hf", "--lm", siglip, "--tokenizer", lm, "--vision", lm, "--out", out)
    assert "model_type=siglip_vision_model; supported language models are phi3" in refused(swapped, out)
    swapped = convert("from-hf", "--lm", lm, "--vision", lm, "--out", out)
    assert "model_type=qwen3" in refused(swapped, out)
    for arguments in (("--lm", lm), ("--aki", lm, "--vision", siglip), ()):
        assert "Give --lm and --vision together" in refused(convert("from-hf", *arguments, "--out", out), out)
    assert "model_type=qwen3, not aki" in refused(convert("from-hf", "--aki", lm, "--out", out), out)
    assert "is not of the AKI release" in refused(convert("from-official", lm, "--out", out), out)
    assert "does not exist" in refused(convert("from-official", tmp_path / "none", "--out", out), out)
    for command in ("to-hf", "to-official", "reshard"):
        assert "No complete checkpoint in" in refused(convert(command, lm, "--out", out), out)
    code, _, errors = convert("verify")
    assert code == 2 and "Give a folder" in errors
    for command in ("verify", "inspect"):
        code, _, errors = convert(command, tmp_path)
        assert code == 2 and "No complete checkpoint in" in errors


def test_an_existing_output_is_not_overwritten(lm: Path, siglip: Path, convert: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    code, _, errors = convert("from-hf", "--lm", lm, "--vision", siglip, "--out", tmp_path / "out")
    assert code == 2 and "exists and is not empty" in errors
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_every_difference_is_listed_and_allowed_only_by_name(
    lm: Path, siglip: Path, convert: Run, tmp_path: Path
) -> None:
    attention = "model.layers.1.self_attn"
    change = {
        NORM: None,
        "stray.a": torch.ones(2),
        "stray.b": torch.ones(2),
        f"{attention}.q_norm.weight": torch.ones(4),
    }
    change[f"{attention}.k_proj.weight"] = None
    folder, out = changed(lm, tmp_path / "lm", change), tmp_path / "out"
    arguments = ("from-hf", "--lm", folder, "--vision", siglip, "--out", out, "--seed", 3)
    message = refused(convert(*arguments), out)
    for line in (
        "5 differences",
        f"missing: {NORM} (for lm_head.norm.weight (32,))",
        f"missing: {attention}.k_proj.weight (for layers.1.attention.qkv_proj.weight (64, 32))",
        f"shape mismatch: {attention}.q_norm.weight is (4,), the model needs (8,)",
        "unexpected: stray.a (2,)",
        "--allow-missing",
    ):
        assert line in message
    arguments += ("--allow-missing", NORM, "--allow-missing", f"{attention}.*", "--allow-unexpected", "stray.a")
    arguments += ("--allow-mismatched", "model.layers.1.*")
    message = refused(convert(*arguments), out)
    assert "1 differences" in message and "stray.b" in message and "stray.a" not in message
    printed = done(convert(*arguments, "--allow-unexpected", "stray.b"))
    assert "(4,) in the source" in printed
    report = json.loads((out / "conversion.json").read_text())
    names = {record["kind"]: record["target_names"] or record["source_names"] for record in report["records"]}
    assert names["mismatched"] == ["layers.1.attention.q_norm.weight"]
    assert names["unexpected"] == ["stray.b"]
    written = CheckpointSource(out)
    random = RandomInitSource(load_model(out / "step_000000" / "config.yaml")[0], 3)
    for name in ("lm_head.norm.weight", "layers.1.attention.qkv_proj.weight", "layers.1.attention.q_norm.weight"):
        assert torch.equal(written.get(name), random.get(name))


def test_an_exported_folder_is_matched_as_strictly(
    lm: Path, siglip: Path, convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--skip-logits-check", "--out")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, *arguments, tmp_path / "start"))
    done(convert("to-hf", tmp_path / "start", *arguments, tmp_path / "export"))
    latents = "model.resampler.latents"
    folder, out = changed(tmp_path / "export", tmp_path / "damaged", {latents: None}), tmp_path / "out"
    assert f"missing: {latents}" in refused(convert("from-hf", "--aki", folder, "--out", out), out)
    monkeypatch.setattr("convert.PROGRESS_SECONDS", 0)
    code, printed, errors = convert("from-hf", "--aki", folder, "--allow-missing", latents, "--seed", 5, "--out", out)
    assert code == 0 and "passed" in printed and "not compared" in printed
    assert "writing the checkpoint: 0.0 of 0.0 GB" in errors and "comparing logits: " in errors
    random, name = (
        RandomInitSource(load_model(out / "step_000000" / "config.yaml")[0], 5),
        latents.removeprefix("model."),
    )
    assert torch.equal(CheckpointSource(out).get(f"input_embedder.{name}"), random.get(f"input_embedder.{name}"))


def test_a_pattern_is_a_name_or_a_prefix() -> None:
    assert matches_any("a.b", ["a.b"]) and matches_any("a.b", ["x", "a.*"]) and matches_any("a.b", ["*"])
    for patterns in (["a"], ["a.b.c"], ["*.b"], []):
        assert not matches_any("a.b", patterns)


def test_a_conversion_that_computes_something_else_is_not_kept(
    lm: Path, siglip: Path, convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("from-hf", "--lm", lm, "--vision", siglip, "--out", tmp_path / "out")
    to_native = conversions_module.to_native

    def swapped(source: object, table: dict[str, tuple[str, ...]]) -> object:
        up = [name for name in table if name.endswith("gate_up_proj.weight")]
        return to_native(source, {**table, **{name: table[name][::-1] for name in up}})  # type: ignore[arg-type]

    monkeypatch.setattr(conversions_module, "to_native", swapped)
    message = refused(convert(*arguments), tmp_path / "out")
    assert "logits of what was written and of its source differ" in message
    assert "FAILED" in message and "in decoder layer 0" in message
    assert "logits not compared (--skip-logits-check)" in done(convert(*arguments, "--skip-logits-check"))


def test_the_tokenizer_decides_the_ids_and_a_model_file_the_rest(
    lm: Path, siglip: Path, convert: Run, tmp_path: Path
) -> None:
    arguments = ("from-hf", "--lm", lm, "--vision", siglip, "--skip-logits-check")
    done(convert(*arguments, "--out", tmp_path / "start"))
    config, _ = load_model(tmp_path / "start" / "step_000000" / "config.yaml")
    model = tmp_path / "model.yaml"
    for vocab_size, resampler in ((57, config.resampler), (56, config.resampler.model_copy(update={"num_layers": 1}))):
        decoder = config.decoder.model_copy(update={"vocab_size": vocab_size})
        expected = config.model_copy(update={"decoder": decoder, "resampler": resampler})
        model.write_text(dump_model(expected, AttentionConfig(rule="causal")))
        result = convert(*arguments, "--model", model, "--out", tmp_path / "out")
        if vocab_size == 57:
            message = refused(result, tmp_path / "out")
            assert "vocab_size=57 and num_added_tokens=2, the tokenizer" in message and "needs 56 and 2" in message
    done(result)
    assert load_model(tmp_path / "out" / "step_000000" / "config.yaml") == (expected, AttentionConfig(rule="causal"))
    layers = {name.split(".")[3] for name in CheckpointSource(tmp_path / "out").specs if "resampler.layers" in name}
    assert layers == {"0"}
