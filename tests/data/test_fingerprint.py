"""Fingerprints are of content: of names and sizes of images, of whole files, and of no path or time."""

import os
import shutil
from pathlib import Path

import pytest
from chat_folders import PHI3_LIKE
from source_files import write_more_sources

from aki_megatron.data import fingerprint as module
from aki_megatron.data.fingerprint import (
    FileFingerprints,
    Fingerprint,
    Part,
    fingerprint_differences,
    tokenizer_fingerprint,
)
from aki_megatron.data.sources import dataset_reader
from aki_megatron.errors import DataError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images in two folders, more than are read."""
    for number in range(300):
        path = tmp_path / f"images/{number % 2}/{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(number % 7))
    return tmp_path


def of(root: Path, *names: str) -> Fingerprint:
    return FileFingerprints(root).fingerprint(names or ("images",), 5)


def test_every_change_of_an_image_folder_is_seen(images: Path) -> None:
    before = of(images)
    assert before.parts["images images"].counts == {"images": 300, "bytes": sum(number % 7 for number in range(300))}
    seen = {before.parts["images images"].digest}
    changes = (
        lambda folder: (folder / "0/000.jpg").unlink(),
        lambda folder: (folder / "1/001.jpg").write_bytes(bytes(8)),
        lambda folder: (folder / "1/003.jpg").rename(folder / "1/004.jpg"),
        lambda folder: (folder / "1/new.PNG").write_bytes(b""),
        lambda folder: (folder / "0/002.jpg").write_bytes(b"ab"),  # one of those that are read, of its size
    )
    for change in changes:
        change(images / "images")
        seen.add(of(images).parts["images images"].digest)
    assert len(seen) == len(changes) + 1


def test_what_is_no_image_and_where_it_is_do_not_matter(images: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = of(images)
    for name in ("README", "Thumbs.db", ".hidden.jpg", "0/list.txt"):
        (images / "images" / name).write_text("x")
    (images / "images/1/again").symlink_to("..")  # a loop
    assert of(images) == before
    copied = tmp_path_factory.mktemp("copy")
    shutil.copytree(images / "images", copied / "images", copy_function=shutil.copy, symlinks=True)
    assert of(copied) == before and of(copied).parts["images images"].location != before.parts["images images"].location


def test_images_that_cannot_be_read_and_empty_folders(images: Path) -> None:
    (images / "images/0/dangling.jpg").symlink_to(images / "nowhere")
    (images / "empty").mkdir()
    found = of(images, "images", "empty")
    assert found.parts["images images"].counts["images"] == 301 and found.parts["images empty"].counts["images"] == 0
    with pytest.raises(DataError, match="absent cannot be read"):
        of(images, "absent")


def test_a_folder_that_several_datasets_share_is_read_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    real = os.scandir
    monkeypatch.setattr(module.os, "scandir", lambda path: listed.append(str(path)) or real(path))
    files = FileFingerprints(images)
    assert files.fingerprint(["images"], 1).parts == files.fingerprint(["images"], 2).parts
    assert len(listed) == 3


@pytest.mark.parametrize("name", ["gqa", "ocrvqa", "scienceqa", "refcoco+", "visualgenome", "llava150k"])
def test_every_file_of_a_dataset_has_a_part(tmp_path: Path, name: str) -> None:
    write_more_sources(tmp_path)
    names = dataset_reader(name).files["train"]
    parts = of(tmp_path, *names).parts
    assert [part.partition(" ")[2] for part in parts] == list(names)
    assert any(part.startswith("file ") for part in parts)
    images = [part.counts["images"] for part_name, part in parts.items() if part_name.startswith("images ")]
    assert images and all(images)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_every_file_that_decides_the_ids_counts(tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(PHI3_LIKE, tmp_path / "tokenizer"))
    before = tokenizer_fingerprint(folder, 100)
    assert before == tokenizer_fingerprint(PHI3_LIKE, 100) and f"file {name}" in before.parts
    (folder / "README.md").write_text("x")
    assert tokenizer_fingerprint(folder, 100) == before
    (folder / name).write_text((folder / name).read_text() + " ")
    (line,) = fingerprint_differences("tokenizer", before, tokenizer_fingerprint(folder, 100))
    assert line.startswith(f"tokenizer, file {name} ({folder / name}): was ") and " bytes (digest " in line


def test_differences_are_named_with_both_values() -> None:
    saved = Fingerprint(1200, {"file a": Part("0" * 32, {"bytes": 1234}), "tar 0": Part("1" * 32, {"samples": 7})})
    now = Fingerprint(1201, {"file a": Part("2" * 32, {"bytes": 1235}, "/d/a"), "tar 1": Part("3" * 32, {})})
    assert fingerprint_differences("source x", saved, now) == [
        "source x: was 1,200 records, is 1,201",
        "source x, file a (/d/a): was 1,234 bytes (digest 000000000000), is 1,235 bytes (digest 222222222222)",
        "source x, tar 0: was 7 samples (digest 111111111111), is absent",
        "source x, tar 1: was absent, is digest 333333333333",
    ]
    assert fingerprint_differences("source x", saved, Fingerprint.from_json(saved.to_json())) == []
