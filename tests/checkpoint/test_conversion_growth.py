"""Nothing is completed silently: tables, tokenizers and values that do not fit config.json are refused with counts."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import Run, done, refused
from safetensors.torch import load_file, save_file
from tiny_folders import language_folder
from torch import Tensor

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def change(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    file = folder / "model.safetensors"
    save_file({**load_file(file), **tensors}, file, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("names", [(EMBEDDING, LM_HEAD), (LM_HEAD,), (EMBEDDING,)])
def test_tables_with_fewer_rows_than_config_json_are_refused(
    names: tuple[str, ...], siglip: Path, convert: Run, tmp_path: Path
) -> None:
    """One of two tensor-parallel slices, or an LM head alone that is shorter."""
    lm, out = language_folder(tmp_path / "lm", "Phi-3.5-mini"), tmp_path / "out"
    tables = load_file(lm / "model.safetensors")
    change(lm, {name: tables[name][:32].clone() for name in names})
    message = refused(convert("from-hf", "--lm", lm, "--vision", siglip, "--out", out), out)
    assert "config.json says vocab_size=64 rows, but " in message
    for name in (EMBEDDING, LM_HEAD):
        assert (f"{name} has 32" in message) == (name in names)


def test_a_tokenizer_that_does_not_fit_is_refused(siglip: Path, convert: Run, tmp_path: Path) -> None:
    lm, out = language_folder(tmp_path / "lm", "Phi-3.5-mini"), tmp_path / "out"
    other = language_folder(tmp_path / "other", "Qwen2.5-3B")
    arguments = ("from-hf", "--lm", lm, "--vision", siglip, "--out", out)
    message = refused(convert(*arguments, "--tokenizer", other), out)
    assert f"The tokenizer {other} lacks the special tokens <s>, <|system|>" in message and "family phi3" in message
    tokenizer = json.loads((lm / "tokenizer.json").read_text())
    for number in range(55, 70):
        tokenizer["added_tokens"].append(tokenizer["added_tokens"][-1] | {"id": number, "content": f"<|x{number}|>"})
    (lm / "tokenizer.json").write_text(json.dumps(tokenizer))
    message = refused(convert(*arguments), out)
    assert f"The tokenizer {lm} has 70 tokens, {lm} has 64 rows" in message


def test_rows_for_added_tokens_are_reported_with_both_numbers(siglip: Path, convert: Run, tmp_path: Path) -> None:
    lm = language_folder(tmp_path / "lm", "LLaMA-3.2-3B")
    printed = done(convert("from-hf", "--lm", lm, "--vision", siglip, "--out", tmp_path / "out"))
    assert "extended" in printed and "from 55 to 64 rows" in printed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, siglip: Path, convert: Run, tmp_path: Path) -> None:
    lm, out = language_folder(tmp_path / "lm", "Qwen3-8B"), tmp_path / "out"
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_file(lm / "model.safetensors")[name]
    weight[3, :2] = value
    change(lm, {name: weight})
    arguments = ("from-hf", "--lm", lm, "--vision", siglip, "--skip-logits-check", "--out", out)
    assert f"model.safetensors: {name} holds 2 NaN or infinite values of 1,536" in refused(convert(*arguments), out)


def test_config_json_with_null_or_zero_is_one_message(siglip: Path, convert: Run, tmp_path: Path) -> None:
    lm, out = language_folder(tmp_path / "lm", "Qwen3-8B"), tmp_path / "out"
    before = (lm / "config.json").read_text()
    arguments = ("from-hf", "--lm", lm, "--vision", siglip, "--out", out)
    for values, expected in (
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta=null; it must be a number above 0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta=null; it must be a number"),
        ({"rope_parameters": None, "rope_theta": "1e6"}, "rope_theta=1e6; it must be a number above 0"),
        ({"num_attention_heads": 0}, "num_attention_heads=0; it must be a whole number above 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0; it must be a whole number above 0"),
        ({"hidden_size": None}, "hidden_size=null; it must be a whole number above 0"),
    ):
        (lm / "config.json").write_text(before)
        change_config(lm, **values)
        assert expected in refused(convert(*arguments), out)


@pytest.mark.parametrize(
    "flags",
    [("--files", "-1"), ("--files", "0"), ("--files", "x"), ("--shard-gigabytes", "nan"), ("--shard-gigabytes", "0")],
)
def test_numbers_of_flags_are_checked_first(flags: tuple[str, str], convert: Run, tmp_path: Path) -> None:
    command = "to-hf" if "gigabytes" in flags[0] else "reshard"
    with pytest.raises(SystemExit) as exit_code:
        convert(command, tmp_path, "--out", tmp_path / "out", f"{flags[0]}={flags[1]}")
    assert exit_code.value.code == 2


def test_ctrl_c_and_a_home_that_the_shell_left(
    siglip: Path, convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_folder(tmp_path / "lm", "Qwen3-8B")
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ("from-hf", "--lm", lm, "--vision", siglip, "--skip-logits-check")
    done(convert(*arguments, "--out=~/start"))
    assert (tmp_path / "start" / "conversion.json").is_file()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aki_megatron.checkpoint.conversions.write_weights", interrupt)
    code, _, errors = convert(*arguments, "--out", tmp_path / "other")
    assert code == 130 and errors == "convert: interrupted; nothing is left of the output.\n"
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".writing_*"))


def test_longrope_with_the_factor_that_transformers_asks_for(siglip: Path, convert: Run, tmp_path: Path) -> None:
    """64 / 16 positions; transformers takes the ratio, whatever is written."""
    lm, out = language_folder(tmp_path / "lm", "Phi-3.5-mini"), tmp_path / "out"
    values = json.loads((lm / "config.json").read_text())["rope_parameters"]
    arguments = ("from-hf", "--lm", lm, "--vision", siglip, "--out", out)
    change_config(lm, rope_parameters=values | {"factor": 8.0})
    assert "factor=8.0; only 64 / 16, the ratio of the lengths" in refused(convert(*arguments), out)
    change_config(lm, rope_parameters=values | {"attention_factor": 2.0})
    assert "unknown attention_factor=2.0" in refused(convert(*arguments), out)
    change_config(lm, rope_parameters=values | {"factor": 4.0, "original_max_position_embeddings": "16"})
    assert "original_max_position_embeddings=16; it must be a number" in refused(convert(*arguments), out)
    scaling = math.sqrt(1 + math.log(4) / math.log(16))
    change_config(lm, rope_parameters=values | {"factor": 4.0, "attention_factor": scaling})
    done(convert(*arguments[:-1], tmp_path / "written", "--skip-logits-check"))
    change_config(lm, rope_parameters=values | {"factor": 4.0, "attention_factor": None})
    assert "passed" in done(convert(*arguments))
    printed = done(convert("to-hf", out, "--skip-logits-check", "--out", tmp_path / "export"))
    assert "longrope: the folder chooses short or long factors for each sequence by its own length" in printed
