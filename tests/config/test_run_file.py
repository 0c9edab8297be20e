"""`base: other.yaml`: what merges, what is replaced, chains, circles, and errors that name file and line of a key."""

from pathlib import Path

import pytest
from demo_runs import PRETRAIN, load, message

from aki_megatron.config.run_file import read_run_file
from aki_megatron.config.save import dump_run, load_saved
from aki_megatron.errors import ConfigError


def write(folder: Path, **texts: str) -> Path:
    """Write NAME.yaml for every text; the path of the last."""
    for name, text in texts.items():
        path = folder / f"{name}.yaml"
        path.write_text(text)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read_run_file(path)
    return str(caught.value)


def test_mappings_merge_and_lists_and_scalars_replace(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        a="train:\n  steps: 5\n  seed: 1\ndata:\n  sources: [{name: x}, {name: y}]\nlog: {interval: 3}\n",
        b="base: a.yaml\ntrain:\n  steps: 7\ndata:\n  sources:\n  - {name: z}\n",
    )
    file = read_run_file(path)
    assert file.values == {
        "train": {"steps": 7, "seed": 1},
        "data": {"sources": [{"name": "z"}]},
        "log": {"interval": 3},
    }
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    assert file.origins == {
        ("train",): (b, 2),
        ("train", "steps"): (b, 3),
        ("train", "seed"): (a, 3),
        ("data",): (b, 4),
        ("data", "sources"): (b, 5),
        ("data", "sources", 0): (b, 6),
        ("data", "sources", 0, "name"): (b, 6),
        ("log",): (a, 6),
        ("log", "interval"): (a, 6),
    }


def test_a_file_without_a_base_is_itself(tmp_path: Path) -> None:
    file = read_run_file(write(tmp_path, a="train:\n  steps: 5\n"))
    assert file.values == {"train": {"steps": 5}}
    assert file.prefix(("train", "steps")) == "line 2: "
    assert file.prefix(("train", "missing")) == "line 1: "
    assert file.prefix(("nowhere",)) == ""


def test_chains_and_paths_relative_to_the_file_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "below").mkdir()
    write(tmp_path, grandparent="train: {steps: 1, seed: 1, precision: fp32}\n")
    write(tmp_path / "below", parent="base: ../grandparent.yaml\ntrain: {steps: 2, seed: 2}\n")
    path = write(tmp_path, child="base: below/parent.yaml\ntrain: {steps: 3}\n")
    expected = {"train": {"steps": 3, "seed": 2, "precision": "fp32"}}
    assert read_run_file(path).values == expected
    monkeypatch.chdir(tmp_path / "below")
    assert read_run_file(Path("../child.yaml")).values == expected


def test_circles_are_refused_with_their_chain(tmp_path: Path) -> None:
    path = write(tmp_path, a="x: 1\nbase: c.yaml\n", b="base: a.yaml\n", c="base: b.yaml\n")
    a, b, c = (tmp_path / f"{name}.yaml" for name in "abc")
    text = refused(path)
    assert text.startswith(f"{a}: line 2: base goes round in a circle: ")
    assert f"{c} -> {b} -> {a} -> {c}; remove one of these bases" in text
    own = write(tmp_path, d="base: ./d.yaml\n")
    assert "base goes round in a circle" in refused(own)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x: 1\nbase: none.yaml\n", "line 2: base: none.yaml: there is no such file"),
        ("base: 7\n", "line 1: base must be the path of a YAML file, relative to this one; got 7"),
        ("base: [a.yaml]\n", "line 1: base must be the path of a YAML file"),
        ("base:\n", "line 1: base must be the path of a YAML file"),
        ("base: broken.yaml\n", "broken.yaml: this is not YAML: line 2"),
        ("base: twice.yaml\n", "twice.yaml: line 2: a is already on line 1"),
    ],
)
def test_bases_that_cannot_be_read(tmp_path: Path, text: str, expected: str) -> None:
    write(tmp_path, broken="a: [1\n", twice="a: 1\na: 2\n")
    assert expected in refused(write(tmp_path, run=text))


def test_errors_name_the_file_and_line_where_the_key_stands(tmp_path: Path) -> None:
    base = write(tmp_path, parent=f"base: {PRETRAIN}\ntrain:\n  steps: 5\n  precision: fp16\n  sed: 1\n")
    path = write(tmp_path, child="base: parent.yaml\ntrain:\n  steps: 0\ndata:\n  captions:\n  - {name: a}\n")
    text = message(config=path)
    assert text.startswith(f"{path}: 4 problems\n")
    assert "  - line 3: train.steps must be a whole number > 0; got 0." in text
    assert f"  - {base} line 4: train.precision must be one of bf16, fp32" in text
    assert f"  - {base} line 5: unknown key train.sed; did you mean train.seed?" in text
    assert "  - line 6: data.captions[0].shards is missing" in text


def test_the_saved_configuration_is_resolved(tmp_path: Path) -> None:
    path = write(tmp_path, child=f"base: {PRETRAIN}\ntrain:\n  steps: 77\n")
    run = load(config=path)
    assert run.train.steps == 77 and run.data == load(config=PRETRAIN).data
    saved = tmp_path / "config.yaml"
    saved.write_text(dump_run(run))
    assert "base" not in read_run_file(saved).values
    assert load_saved(saved) == run


def test_flags_win_over_base_and_file(tmp_path: Path) -> None:
    path = write(tmp_path, child=f"base: {PRETRAIN}\ntrain:\n  steps: 77\n")
    assert load("--train.steps", "78", config=path).train.steps == 78
    assert "unknown flag --base" in message("--base", "x.yaml")
