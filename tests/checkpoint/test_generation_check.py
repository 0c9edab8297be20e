"""to-hf generates with the exported folder's own files: what generates otherwise than ours is not kept."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from convert_helpers import Run, done, refused
from tiny_folders import language_folder

from aki_megatron.checkpoint import hf_export
from aki_megatron.errors import CheckpointError
from aki_megatron.evaluate import generation_check
from aki_megatron.evaluate.generation_check import check_generation


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, siglip: Path) -> Path:
    """A checkpoint, from another working directory than the one of to-hf."""
    from aki_megatron.checkpoint.conversion_steps import ConversionSettings
    from aki_megatron.checkpoint.conversions import from_hf

    folder = tmp_path_factory.mktemp("start")
    lm = language_folder(folder / "lm", "Phi-3.5-mini")
    from_hf(lm, siglip, folder, ConversionSettings(check_logits=False), model=None, tokenizer=lm)
    return folder / "step_000000"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, start: Path) -> Path:
    """Its export."""
    from aki_megatron.checkpoint.conversion_steps import ConversionSettings
    from aki_megatron.checkpoint.conversions import to_hf

    folder = tmp_path_factory.mktemp("exported")
    to_hf(start, folder, ConversionSettings(check_logits=False), tokenizer=None)
    return folder


def edited(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / name).read_text()
        assert text.count(old) == 1, (name, old)
        (folder / name).write_text(text.replace(old, new))

    return edit


def other_names(folder: Path) -> None:
    """The folder's code has a tensor under another name than the folder."""
    edited("modeling_aki.py", "self.norm = nn.LayerNorm(dim", "self.norms = nn.LayerNorm(dim")(folder)
    edited("modeling_aki.py", "self.projection(self.norm(latents))", "self.projection(self.norms(latents))")(folder)


def test_to_hf_generates_and_says_so(start: Path, convert: Run, tmp_path: Path) -> None:
    printed = done(convert("to-hf", start, "--out", tmp_path / "out"))
    assert "generation: passed. The folder's own code continues 3 prompts" in printed
    notes = json.loads((tmp_path / "out" / "conversion.json").read_text())["notes"]
    assert notes["generation"].startswith("passed") and "MMA mask active: passed" in notes["check"]
    assert not (tmp_path / "out" / "__pycache__").exists()
    assert not [name for name in sys.modules if name.startswith("aki_exported")]
    printed = done(convert("to-hf", start, "--skip-logits-check", "--out", tmp_path / "unchecked"))
    assert "generation" not in printed


def test_of_a_large_model_the_first_layers_generate(
    start: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_check, "WHOLE_MODEL_BYTES", 1000)
    monkeypatch.setattr(generation_check, "NUM_LAYERS", 1)
    assert "with the first 1 of 2 decoder layers" in check_generation(exported, start, start / "tokenizer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            edited("modeling_aki.py", "(causal | look_ahead)", "causal"),
            "its model gives logits for prompt 1 that differ by",
        ),
        (edited("modeling_aki.py", "**kwargs | {CACHE: cache},", "**kwargs,"), "its model (gives|continues)"),
        (other_names, r"its model does not take its tensors \(missing_keys: .*norms.weight"),
        (edited("processing_aki.py", "tokens * self.num", "tokens * 2 * self.num"), "other input_ids for prompt"),
        (
            edited("chat_template.jinja", "{%- if add_generation_prompt", "w5 {%- if add_generation_prompt"),
            "other input_ids",
        ),
        (edited("preprocessor_config.json", '"ignore"', '"white"'), "other pixel_values than training for example.png"),
        (edited("generation_config.json", '"pad_token_id": 55', '"pad_token_id": 54'), "pad_token_id=54, the run"),
    ],
)
def test_what_generates_otherwise_is_refused(
    change: Callable[[Path], None], message: str, start: Path, exported: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(exported, folder)
    change(folder)
    with pytest.raises(CheckpointError, match=f"does not generate what the run generates.*{message}"):
        check_generation(folder, start, start / "tokenizer")


def test_nothing_is_left_of_a_folder_that_generates_otherwise(
    start: Path, convert: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = hf_export._copy

    def broken_copy(name: str, out: Path) -> None:
        copy(name, out)
        if name == hf_export.MODELLING:
            edited(name, "(causal | look_ahead)", "causal")(out)

    monkeypatch.setattr(hf_export, "_copy", broken_copy)
    message = refused(convert("to-hf", start, "--out", tmp_path / "out"), tmp_path / "out")
    assert "its model gives logits for prompt 1 that differ by" in message
