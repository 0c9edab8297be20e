"""An export has the tokenizer and the system message of its run, from wherever it is exported."""

import json
from pathlib import Path

import pytest
import torch
from convert_helpers import Run, done, refused
from safetensors.torch import load_file
from tiny_folders import language_folder

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.checkpointer import Checkpointer
from aki_megatron.checkpoint.conversion_steps import ConversionSettings, open_checkpoint, write_weights
from aki_megatron.checkpoint.run_text import read_tokenizer_files, run_images, run_system_message, run_tokenizer
from aki_megatron.config.data import SYSTEM_MESSAGE, ImagesConfig
from aki_megatron.data.fingerprint import tokenizer_fingerprint
from aki_megatron.errors import CheckpointError
from aki_megatron.families.registry import FAMILIES

MESSAGE = "Answer 'briefly'.\nIn \\ English.\r{{ no }} $5"


def old_checkpoint(folder: Path, tokenizer: Path | str, fingerprint_of: Path | None = None) -> Path:
    """The files of a checkpoint that holds no tokenizer, with a fingerprint of one if given."""
    folder.mkdir()
    (folder / files.CONFIG).write_text(f"data: {{tokenizer: {tokenizer}, system_message: Answer briefly.}}\n")
    of = {"tokenizer": tokenizer_fingerprint(fingerprint_of, 57).to_json()} if fingerprint_of else {}
    (folder / files.EXTRA).write_text(json.dumps({"extra": {"fingerprints": {"version": 1, "of": of}}}))
    return folder


def test_a_run_keeps_its_tokenizer_in_every_checkpoint(tmp_path: Path) -> None:
    source = language_folder(tmp_path / "lm", "Phi-3.5-mini")
    kept = read_tokenizer_files(source)
    assert {"tokenizer.json", "tokenizer_config.json"} <= kept.keys() and "config.json" not in kept
    checkpointer = Checkpointer(tmp_path / "run", keep_last=1, config_yaml="# a run\n", tokenizer_files=kept)
    checkpointer.save(3, {"weight.x": torch.ones(2)}, {})
    path = checkpointer.latest()
    assert path is not None
    found = run_tokenizer(path)
    assert found == path / "tokenizer" and read_tokenizer_files(found) == kept
    assert {f"tokenizer/{name}" for name in kept} <= files.read_manifest(path).keys()


def test_without_one_it_is_found_by_its_content_and_never_by_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, other = (language_folder(tmp_path / name, name) for name in ("Phi-3.5-mini", "Qwen2.5-3B"))
    monkeypatch.chdir(tmp_path)
    assert run_tokenizer(old_checkpoint(tmp_path / "a", source)) == source
    assert run_tokenizer(old_checkpoint(tmp_path / "b", source.name, source)) == Path(source.name)
    for name, tokenizer, fingerprint_of, reason in (
        ("c", source.name, None, "the relative path data.tokenizer=Phi-3.5-mini may be another one from here"),
        ("d", source.name, other, "has other files than the tokenizer"),
        ("e", source, other, "has other files than the tokenizer"),
        ("f", "elsewhere", source, "data.tokenizer=elsewhere is no folder here"),
    ):
        with pytest.raises(CheckpointError, match=f"{reason}.*--tokenizer FOLDER"):
            run_tokenizer(old_checkpoint(tmp_path / name, tokenizer, fingerprint_of))
    assert run_system_message(tmp_path / "a") == "Answer briefly."


@pytest.mark.parametrize("message", [MESSAGE, "", SYSTEM_MESSAGE])
def test_the_system_message_goes_out_and_comes_back(message: str, siglip: Path, convert: Run, tmp_path: Path) -> None:
    """As do the settings of images."""
    flags = ("--skip-logits-check", "--out")
    images = ImagesConfig(transparency="white", exif_rotation=True) if message == MESSAGE else ImagesConfig()
    lm = language_folder(tmp_path / "lm", "Qwen3-8B")
    done(convert("from-hf", "--lm", lm, "--vision", siglip, *flags, tmp_path / "start"))
    source, model = open_checkpoint(tmp_path / "start")
    write_weights(tmp_path / "run", source, model, ConversionSettings(), source.path / "tokenizer", message, images)
    done(convert("to-hf", tmp_path / "run", "--dtype", "bf16", *flags, tmp_path / "export"))
    assert {t.dtype for t in load_file(tmp_path / "export" / "model.safetensors").values()} == {torch.bfloat16}
    template = (tmp_path / "export" / "chat_template.jinja").read_text()
    assert template == FAMILIES["qwen3"].chat.chat_template(message)
    for name in ("processor_config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "export" / name).is_file()
    done(convert("from-hf", "--aki", tmp_path / "export", *flags, tmp_path / "back"))
    assert run_system_message(tmp_path / "back" / "step_000000") == message
    assert run_images(tmp_path / "back" / "step_000000") == images
    (tmp_path / "export" / "processor_config.json").write_text("[")
    broken = convert("from-hf", "--aki", tmp_path / "export", *flags, tmp_path / "broken")
    assert "processor_config.json is not a JSON object" in refused(broken, tmp_path / "broken")
    (tmp_path / "export" / "processor_config.json").unlink()
    (tmp_path / "export" / "preprocessor_config.json").write_text('{"transparency": "black"}')
    broken = convert("from-hf", "--aki", tmp_path / "export", *flags, tmp_path / "broken")
    assert "preprocessor_config.json holds other image settings" in refused(broken, tmp_path / "broken")


@pytest.mark.parametrize("message", [MESSAGE, ""])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_chat_template_writes_any_system_message(family: str, message: str) -> None:
    import jinja2

    chat = FAMILIES[family].chat
    written = (
        jinja2.Environment()
        .from_string(chat.chat_template(message))
        .render(messages=[{"role": "user", "content": "q"}], add_generation_prompt=True)
    )
    system = f"{chat.header('system')}{message}{chat.turn_end}{chat.turn_separator}" if message else ""
    user = f"{chat.header('user')}q{chat.turn_end}{chat.turn_separator}"
    assert written == chat.conversation_start + system + user + chat.response_start
