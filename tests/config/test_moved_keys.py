"""Keys of earlier versions: refused with the new name wherever they stand, and renamed for an upgrade."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from demo_runs import PRETRAIN, ROOT, SFT, edited, load, message

from aki_megatron.config.data import SourceConfig
from aki_megatron.config.moved_keys import MOVED_KEYS, MOVED_VALUES, NEW_FORMATS, moved_keys, rename_moved
from aki_megatron.config.nested import flatten
from aki_megatron.config.run_file import read_run_file
from aki_megatron.config.save import check_resume, dump_run, load_model, load_saved
from aki_megatron.config.validation import KEYS
from aki_megatron.errors import ConfigError

OLD_KEYS = {new: old for old, new in MOVED_KEYS.items()}
SOURCES = {f"data.sources[].{name}": info for name, info in SourceConfig.model_fields.items()}


def with_old_keys(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a run file under the keys of the version before."""
    old: dict[str, Any] = {}
    for key, value in flatten(values):
        *path, last = OLD_KEYS.get(key, key).split(".")
        inner = old
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return old


def test_new_names_exist_and_old_ones_do_not() -> None:
    known = KEYS | SOURCES
    for old, new in MOVED_KEYS.items():
        assert new in known and old not in known, (old, new)
    for key, values in MOVED_VALUES.items():
        assert key in known
        for old, new in values.items():
            allowed = get_args(known[key].annotation) or (True, False)
            assert new in allowed and old not in allowed
    assert set(NEW_FORMATS) <= set(MOVED_KEYS.values())


@pytest.mark.parametrize("old", [old for old in MOVED_KEYS if "[]" not in old])
def test_an_old_key_is_refused_with_its_new_name(tmp_path: Path, old: str) -> None:
    file = edited(tmp_path, {old: 3, MOVED_KEYS[old]: 3})
    assert f"{old} is called {MOVED_KEYS[old]} now" in message(config=file)
    assert f"--{old} is called --{MOVED_KEYS[old]} now" in message(f"--{old}", "3")


def test_an_old_file_gets_its_new_names_and_no_other_error(tmp_path: Path) -> None:
    file = tmp_path / "old.yaml"
    values = read_run_file(PRETRAIN).values
    file.write_text(yaml.safe_dump(with_old_keys(values)))
    text = message(config=file)
    renamed = [key for key, _ in flatten(values) if key in OLD_KEYS]
    assert text.startswith(f"{file}: {len(renamed)} problems\n") and len(renamed) >= 20
    assert text.count("\n  - line ") == text.count(" is called ") == len(renamed)
    assert "upgrade" not in text


def test_old_keys_in_lists(tmp_path: Path) -> None:
    sources = [{"name": "vsr"}, {"name": "llava150k", "dialogues": "whole"}]
    text = message(config=edited(tmp_path, {"data.sources": sources}))
    assert "data.sources[1].dialogues is called data.sources[1].split_turns now: true instead of single, false" in text
    assert "data.sources[0].split_turns now" in message("--data.sources", "[{name: vsr, dialogues: single}]")


def test_old_values(tmp_path: Path) -> None:
    expected = "data.mixing: the value length is called proportional now."
    assert expected in message(config=edited(tmp_path, {"data.mixing": "length"}))
    assert expected in message("--data.mixing", "length")
    assert load("--data.mixing", "proportional").data.mixing == "proportional"


def test_an_old_run_folder_is_refused_with_the_way_out(tmp_path: Path) -> None:
    run = load()
    saved = tmp_path / "runs" / "config.yaml"
    saved.parent.mkdir()
    saved.write_text(yaml.safe_dump(with_old_keys(run.model_dump(mode="json"))))
    way_out = f"upgrade it once: python tools/convert.py upgrade {saved.parent} --out NEW_FOLDER"
    for refused in (lambda: load_saved(saved), lambda: check_resume(saved, run), lambda: load_model(saved)):
        with pytest.raises(ConfigError, match=r"model\.decoder\.width is called model\.decoder\.hidden_size") as caught:
            refused()
        assert way_out in str(caught.value)
    assert way_out in message(config=saved)
    saved.write_text(dump_run(run).replace("steps:", "stepz:"))
    with pytest.raises(ConfigError) as caught:
        load_saved(saved)
    assert "upgrade" not in str(caught.value)


def test_renaming_gives_the_run_that_was_meant(tmp_path: Path) -> None:
    for config in (SFT, PRETRAIN, ROOT / "configs/aki4b/sft.yaml"):
        values = read_run_file(config).values
        old = with_old_keys(values)
        assert old != values
        assert rename_moved(old) == values == rename_moved(values)
        assert list(moved_keys(values)) == []
    old = {"data": {"mixing": "length", "sources": [{"dialogues": "whole"}, {"dialogues": "single"}]}}
    new = {"data": {"mixing": "proportional", "sources": [{"split_turns": False}, {"split_turns": True}]}}
    assert rename_moved(old) == new
