"""YAML is read as a person means it, and what is wrong with a file is expected with its line."""

from pathlib import Path
from typing import Any

import pytest

from aki_megatron.config.yaml_file import read_value, read_yaml
from aki_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("275_000", 275_000),
        ("010", "010"),
        ("1:30", "1:30"),
        ("no", "no"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1e", "1e"),
        ("2024-01-01", "2024-01-01"),
        ("[1, 2e-1, a]", [1, 0.2, "a"]),
        ("{00000..00007}.tar", "{00000..00007}.tar"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    got = read_value(text)
    assert got == value
    assert type(got) is type(value)


def refused(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  steps: 1\n  steps: 2\n", "line 3: train.steps is already on line 2"),
        ("a: 1\nb: 2\na: 3\n", "line 3: a is already on line 1"),
        ("a: [1, 2\n", "this is not YAML: line 2, column 1"),
        ("a: 1\n\tb: 2\n", "this is not YAML: line 2"),
        ("- a\n- b\n", "a run is a mapping of sections (run, data, train, ...), got list"),
        ("", "got nothing"),
        ("1: 2\n", "line 1: a key must be a name, got '1'"),
        ("a: !!python/object/apply:os.getcwd []\n", "this is not YAML: line 1"),
        ("a: &x [1]\nb: *x\n", "line 2, column 4: aliases (*name) are not read"),
    ],
)
def test_what_is_no_run_is_refused_with_its_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such file"):
        read_yaml(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as text"):
        read_yaml(tmp_path / "binary.yaml")


def test_lines_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("a:\n  b: 1\n  c:\n  - x\n  - {d: 2}\n")
    lines = read_yaml(path).lines
    assert lines[("a", "b")] == 2
    assert lines[("a", "c", 1, "d")] == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: " + "[" * 40 + "]" * 40, "its values are nested more than 32 levels deep."),
        ("a: " + "[" * 5000 + "]" * 5000, "its values are nested too deeply to be read."),
        ("a: " + "{b: " * 3000 + "1" + "}" * 3000, "its values are nested too deeply to be read."),
        ("a: " + "9" * 5000, "holds a value that cannot be read: "),
    ],
)
def test_values_without_end(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file}: {expected}") and "\n" not in str(caught.value)
