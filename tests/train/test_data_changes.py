"""A run goes on with the data that its checkpoint was trained on, wherever that is, and with no other."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from aki_megatron.checkpoint import files
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import dump_run
from aki_megatron.data.pipeline import build_sources, build_tokenizer
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer
from aki_megatron.train.continuation import check_continuation
from aki_megatron.train.data_changes import (
    EXTRA_KEY,
    fingerprint_run,
    fingerprints_to_json,
    saved_fingerprints,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs/demo"
DATA_TESTS = Path(__file__).resolve().parents[1] / "data"

QUESTIONS = "VQA/v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "VQA/v2_mscoco_train2014_annotations.json"
IMAGE = "VQA/train2014/COCO_train2014_000000000003.jpg"


@pytest.fixture(scope="module")
def helpers() -> Any:
    """The writers of small files of the data tests."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(str(DATA_TESTS))
        import data_files

        return data_files


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Path:
    """A folder with several datasets, three tars, a tokenizer and an encoder."""
    root = tmp_path_factory.mktemp("original")
    helpers.write_sources(root)
    for number in range(3):
        helpers.write_tar(root / f"captions/{number}.tar", helpers.pairs(200, first=200 * number))
    write_tokenizer(root / "tokenizer")
    (root / "encoder").mkdir()
    (root / "encoder/model.safetensors").write_bytes(bytes(range(256)) * 1000)
    return root


@pytest.fixture
def root(tmp_path: Path, original: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(original, tmp_path / "data"))


def sft(root: Path, *flags: str) -> RunConfig:
    return configured("sft", root, "--init.weights", "null", "--data.sources", "[{name: vqav2}, {name: vsr}]", *flags)


def pretrain(root: Path, *flags: str) -> RunConfig:
    captions = '[{name: captions, shards: ["captions/{0..2}.tar"]}]'
    return configured("pretrain", root, "--data.captions", captions, "--init.vision", str(root / "encoder"), *flags)


def configured(name: str, root: Path, *flags: str) -> RunConfig:
    config = CONFIGS / f"{name}.yaml"
    arguments = ["--config", str(config), "--data.root", str(root), "--data.tokenizer", str(root / "tokenizer")]
    arguments += ["--run.dir", str(root.parent / "run"), *flags]
    return load_run(arguments, default_config=config, prog="x", description="")


def start(config: RunConfig, checkpoint: Path | None, *allow_change: str) -> tuple[Any, list[str]]:
    sources = build_sources(config.data, lambda line: None)
    return fingerprint_run(config, build_tokenizer(config), sources, checkpoint, allow_change)


def save(config: RunConfig, *, with_fingerprints: bool = True) -> Path:
    """Write the files that a run which was saved after step 3 leaves, as far as a resume compares them."""
    paths = RunPaths(config.run.dir)
    checkpoint = paths.checkpoints / files.checkpoint_name(3)
    checkpoint.mkdir(parents=True)
    extra = {"step": 3, "data_step": 3, "data": {"version": 2}}
    if with_fingerprints:
        extra[EXTRA_KEY] = fingerprints_to_json(start(config, None)[0])
    (checkpoint / files.EXTRA).write_text(json.dumps({"extra": extra}))
    (checkpoint / files.CONFIG).write_text(dump_run(config))
    (checkpoint / files.MANIFEST).write_text("{}")
    paths.config.write_text(dump_run(config))
    return checkpoint


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def add_row(root: Path) -> None:
    edit_json(root / QUESTIONS, lambda found: found["questions"].append({**found["questions"][0], "question_id": 999}))
    # annotations are in the reverse order of the questions
    edit_json(
        root / ANNOTATIONS, lambda found: found["annotations"].append({**found["annotations"][-1], "question_id": 999})
    )


def remove_row(root: Path) -> None:
    kept = json.loads((root / QUESTIONS).read_text())["questions"][:-1]
    ids = {question["question_id"] for question in kept}
    edit_json(root / QUESTIONS, lambda found: found.update(questions=kept))

    def remove(found: Any) -> None:
        found["annotations"] = [answer for answer in found["annotations"] if answer["question_id"] in ids]

    edit_json(root / ANNOTATIONS, remove)


def edit_row(root: Path) -> None:
    path = root / QUESTIONS
    before = path.stat()
    path.write_text(path.read_text().replace("How many cats 7?", "How many dogs 7?"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit_line(root: Path) -> None:
    path = root / "vsr/train-random.jsonl"
    path.write_text(path.read_text().replace("The fish 3 ", "The duck 3 "))


def replace_image(root: Path) -> None:
    shutil.copy(root / "VQA/train2014/COCO_train2014_000000000004.jpg", root / IMAGE)


def remove_image(root: Path) -> None:
    (root / IMAGE).unlink()


def replace_tokenizer(root: Path) -> None:
    """Exchange two tokens: the number of tokens stays."""

    def exchange(found: Any) -> None:
        vocabulary = found["model"]["vocab"]
        first, second = [token for token in vocabulary if len(token) == 1 and token.isalpha()][:2]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit_json(root / "tokenizer/tokenizer.json", exchange)


CHANGES: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "row added": (
        add_row,
        ["source vqav2: was 12 records, is 13", f"source vqav2, file {QUESTIONS} (", f"file {ANNOTATIONS} ("],
        "data.root",
    ),
    "row removed": (remove_row, ["source vqav2: was 12 records, is 11"], "data.root"),
    "row edited": (edit_row, [f"source vqav2, file {QUESTIONS} (", " bytes (digest "], "data.root"),
    "line edited": (edit_line, ["source vsr, file vsr/train-random.jsonl ("], "data.root"),
    "image replaced": (replace_image, ["source vqav2, images VQA/train2014 (", "was 12 images, "], "data.root"),
    "image removed": (remove_image, ["was 12 images, ", "is 11 images, "], "data.root"),
    "tokenizer": (replace_tokenizer, ["tokenizer, file tokenizer.json ("], "data.tokenizer"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_data_is_refused_and_named(root: Path, what: str) -> None:
    change, expected, key = CHANGES[what]
    config = sft(root)
    checkpoint = save(config)
    assert start(config, checkpoint)[1] == []
    change(root)
    with pytest.raises(DataError) as caught:
        start(config, checkpoint)
    text = str(caught.value)
    assert text.startswith(f"The data is not what {checkpoint} was trained on:")
    assert all(part in text for part in expected), text
    assert f"--allow_change {key}." in text
    other = {"data.root": "data.tokenizer", "data.tokenizer": "data.root"}[key]
    with pytest.raises(DataError):
        start(config, checkpoint, other)
    fingerprints, lines = start(config, checkpoint, key)
    assert lines and all(part in "\n".join(lines) for part in expected)
    assert fingerprints == start(config, None)[0]


def test_changed_tars_are_refused_and_named(root: Path, helpers: Any) -> None:
    config = pretrain(root)
    checkpoint = save(config)
    tar, whole = root / "captions/1.tar", (root / "captions/1.tar").read_bytes()
    assert start(config, checkpoint)[1] == []

    def refusal() -> str:
        with pytest.raises(DataError, match="The data is not what") as caught:
            start(config, checkpoint)
        return str(caught.value)

    helpers.write_tar(tar, helpers.pairs(200, first=1000))  # as many samples, of the same sizes
    text = refusal()
    assert f"source captions, tar 1 ({tar}): was 200 samples (digest " in text and "is 200 samples" in text
    assert "tar 0" not in text and "records" not in text
    members = helpers.pairs(200, first=200)
    members[201] = (members[201][0], b"The green bird 300.\n")  # between the blocks of the tar's own digest
    helpers.write_tar(tar, members)
    assert tar.stat().st_size == len(whole)
    assert "tar 1" in refusal()
    helpers.write_tar(tar, helpers.pairs(201, first=200))
    assert "source captions: was 600 records, is 601" in refusal()
    tar.write_bytes(whole)
    assert start(config, checkpoint)[1] == []
    fewer = pretrain(root, "--data.captions", '[{name: captions, shards: ["captions/{0,1}.tar"]}]')
    with pytest.raises(DataError, match=r"tar 2: was 200 samples \(digest .{12}\), is absent"):
        start(fewer, checkpoint)


def test_a_source_that_is_gone_or_new_is_named(root: Path) -> None:
    checkpoint = save(sft(root))
    other = sft(root, "--data.sources", "[{name: vqav2}, {name: aokvqa}]")
    with pytest.raises(DataError, match=r"(?s)source vsr: is gone\n.*source aokvqa: was not there before"):
        start(other, checkpoint)


@pytest.mark.parametrize("build", [sft, pretrain])
def test_moved_data_is_accepted(root: Path, build: Callable[..., RunConfig]) -> None:
    config = build(root)
    checkpoint = save(config)
    moved = root.parent / "elsewhere/below"
    moved.parent.mkdir()
    shutil.copytree(root, moved, copy_function=shutil.copy)  # with other times
    shutil.rmtree(root)
    new = build(moved, "--run.dir", str(config.run.dir))
    assert new.data.root != config.data.root
    assert check_continuation(RunPaths(config.run.dir), new, ()) == ""
    fingerprints, lines = start(new, checkpoint)
    assert lines == [] and fingerprints == saved_fingerprints(checkpoint)


def test_tars_outside_of_the_root_are_accepted(root: Path) -> None:
    config = pretrain(root)
    checkpoint = save(config)
    (root / "captions").rename(root.parent / "tars")
    shards = f'[{{name: captions, shards: ["{root.parent}/tars/{{0..2}}.tar"]}}]'
    new = pretrain(root, "--data.captions", shards)
    assert check_continuation(RunPaths(config.run.dir), new, ()) == ""
    assert start(new, checkpoint)[1] == []


def test_moved_weights_are_accepted_and_others_refused(root: Path) -> None:
    config = pretrain(root)
    save(config)
    paths = RunPaths(config.run.dir)
    shutil.copytree(root / "encoder", root / "moved")
    assert check_continuation(paths, pretrain(root, "--init.vision", str(root / "moved")), ()) == ""
    (root / "moved/model.safetensors").write_bytes(bytes(256_000))
    for other in (root / "moved", root / "absent"):
        with pytest.raises(ConfigError, match="init.vision was .*encoder.* when the run started"):
            check_continuation(paths, pretrain(root, "--init.vision", str(other)), ())


def test_other_keys_are_compared_as_ever(root: Path) -> None:
    config = sft(root)
    save(config)
    with pytest.raises(ConfigError, match="train.seed was"):
        check_continuation(RunPaths(config.run.dir), sft(root, "--train.seed", "7"), ())


def test_without_fingerprints_paths_are_compared(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = sft(root)
    checkpoint = save(config, with_fingerprints=False)
    shutil.copytree(root, root.parent / "moved")
    new = sft(root.parent / "moved", "--run.dir", str(config.run.dir))
    with pytest.raises(ConfigError, match="data.root was"):
        check_continuation(RunPaths(config.run.dir), new, ())
    assert start(config, checkpoint)[1] == []
    assert "holds no fingerprint of its data" in caplog.text


@pytest.mark.parametrize("extra", ["", "[]", '{"extra": {"fingerprints": 1}}', '{"extra": {"fingerprints": {}}}'])
def test_damaged_fingerprints_are_none(root: Path, extra: str) -> None:
    checkpoint = save(sft(root))
    (checkpoint / files.EXTRA).write_text(extra)
    assert saved_fingerprints(checkpoint) == {}


def test_fingerprints_survive_json(root: Path) -> None:
    config = pretrain(root)
    assert saved_fingerprints(save(config)) == start(config, None)[0]
    saved = yaml.safe_load((RunPaths(config.run.dir).checkpoints / "step_000003" / files.EXTRA).read_text())
    assert str(root) not in json.dumps(saved)  # whatever the path
