"""Checkpoint files on disk: complete or not there at all, and checked before anything in them is read.

A folder of checkpoints holds, besides ``step_000100`` and so on, names that begin with a dot, which no reader takes for
a checkpoint: ``.writing_`` is being written, ``.removing_`` is being removed, and ``.replaced_`` stands in for the
checkpoint of that step until a new one of the same step has taken its place.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aki_megatron.errors import CheckpointError

MANIFEST, LATEST, PREFIX = "manifest.json", "latest", "step_"
"""A folder without a manifest is no checkpoint; ``latest`` holds the name of the newest one."""

INDEX, EXTRA, CONFIG = ".metadata", "extra.json", "config.yaml"
"""torch's index of the tensors; what else was saved with them; the run, or the model, that they belong to."""

WRITING, REMOVING, REPLACED = ".writing_", ".removing_", ".replaced_"

DIGEST_BYTES = 2**22
"""Files are read in pieces of this size."""


def folder_name(step: int) -> str:
    """step_000100"""
    return f"{PREFIX}{step:06d}"


def step_of(path: Path) -> int:
    """100 of step_000100."""
    return int(path.name.removeprefix(REPLACED).removeprefix(PREFIX))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    named = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    named += [path for path in folder.glob(f"{REPLACED}*") if not (folder / path.name.removeprefix(REPLACED)).exists()]
    return sorted((path for path in named if (path / MANIFEST).is_file()), key=step_of)


def newest(folder: Path) -> Path | None:
    """What ``latest`` points to; the highest step where it points to nothing."""
    pointer = folder / LATEST
    if pointer.is_file() and (named := folder / pointer.read_text().strip()) in checkpoints(folder):
        return named
    return next(reversed(checkpoints(folder)), None)


def find(path: Path) -> Path:
    """The checkpoint meant by a checkpoint, a folder of checkpoints, or a run folder.

    Errors: CheckpointError when there is none.
    """
    if (path / MANIFEST).is_file() or path.name.startswith(PREFIX):
        return path
    for folder in (path / "checkpoints", path):
        if found := newest(folder):
            return found
    raise CheckpointError(
        f"No complete checkpoint in {path}: looked for {PREFIX}*/{MANIFEST} there and in its folder checkpoints."
    )


def digest(path: Path) -> dict[str, Any]:
    """Manifest entry of a file: bytes and sha256."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while piece := file.read(DIGEST_BYTES):
            sha256.update(piece)
            size += len(piece)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def write_text(path: Path, content: str) -> None:
    """Write and force to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write and force to disk."""
    write_text(path, json.dumps(content, indent=1))


def begin(folder: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of ``step`` into, aside; what killed processes left behind goes."""
    for stale in (*folder.glob(f"{WRITING}*"), *folder.glob(f"{REMOVING}*")):
        shutil.rmtree(stale)
    for replaced in folder.glob(f"{REPLACED}*"):
        name = replaced.name.removeprefix(REPLACED)
        if (folder / name).exists():
            _remove(replaced)
        else:
            replaced.rename(folder / name)
    aside = folder / f"{WRITING}{folder_name(step)}"
    aside.mkdir(parents=True)
    return aside


def complete(aside: Path, step: int, written: Mapping[str, Any]) -> Path:
    """Give a folder that ``begin`` made its manifest, its name, and ``latest``; the checkpoint's folder.

    written  manifest entries of the files whose content is known to be on disk; the others are read for theirs

    Errors: CheckpointError when a file of ``written`` is not here, or not as long as it was.
    """
    for name, entry in written.items():
        found = (aside / name).stat().st_size if (aside / name).is_file() else "no"
        if found != entry["bytes"]:
            raise CheckpointError(
                f"{aside / name} has {found} bytes here instead of the {entry['bytes']} that were written: the folder "
                "must lie on a file system that all ranks share"
            )
    others = sorted(path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file())
    listed = dict(written) | {name: digest(aside / name) for name in others if name not in written}
    write_json(aside / MANIFEST, {"step": step, "files": listed})
    return publish(aside, folder_name(step))


def publish(aside: Path, name: str) -> Path:
    """Rename a finished folder to ``name``, replacing one of that name, then move ``latest``."""
    folder, target = aside.parent, aside.parent / name
    sync_folder(aside)
    if target.exists():
        replaced = folder / f"{REPLACED}{name}"
        target.rename(replaced)
        aside.rename(target)
        sync_folder(folder)
        _remove(replaced)
    else:
        aside.rename(target)
    sync_folder(folder)
    pointer = folder / f".{LATEST}"
    write_text(pointer, name + "\n")
    pointer.rename(folder / LATEST)
    sync_folder(folder)
    return target


def prune(folder: Path, *, keep_last: int, keep_every: int) -> None:
    """Remove checkpoints that are not among the newest ``keep_last``, nor of a multiple of ``keep_every`` steps (if
    that is not 0), nor what ``latest`` points to."""
    current = newest(folder)
    for path in checkpoints(folder)[:-keep_last]:
        if path != current and not (keep_every and step_of(path) % keep_every == 0):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; half-removed it is none."""
    gone = path.parent / f"{REMOVING}{folder_name(step_of(path))}"
    path.rename(gone)
    shutil.rmtree(gone)


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_manifest(path: Path) -> dict[str, Any]:
    """Files of a checkpoint by name.

    Errors: CheckpointError when ``path`` is no complete checkpoint.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder. {alternatives(path)}")
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        assert isinstance(files, dict)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} holds no {MANIFEST}, so it is not a complete checkpoint. {alternatives(path)}"
        ) from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise CheckpointError(f"{path / MANIFEST} is corrupt. {alternatives(path)}") from None
    if CONFIG not in files:
        raise CheckpointError(
            f"{path} was written before checkpoints held their {CONFIG}; use the version of this project that wrote it."
        )
    return files


def verify(path: Path, names: Iterable[str], files: Mapping[str, Any]) -> None:
    """Compare the named files with the manifest.

    Errors: CheckpointError that names the first file that differs and the checkpoint to go back to.
    """
    if wrong := first_wrong(path, names, files):
        raise CheckpointError(f"{wrong}. {alternatives(path)}")


def first_wrong(path: Path, names: Iterable[str], files: Mapping[str, Any]) -> str | None:
    """What is wrong with the first named file that is not what the manifest says."""
    for name in names:
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        found = digest(file)
        if found["bytes"] != files[name]["bytes"]:
            return f"{file} has {found['bytes']} bytes instead of {files[name]['bytes']}"
        if found["sha256"] != files[name]["sha256"]:
            return f"{file} is corrupt: its sha256 is not that of the manifest"
    return None


def alternatives(path: Path) -> str:
    """Which whole checkpoint to go back to, as a sentence."""
    for other in reversed(checkpoints(path.parent)):
        if other.name == path.name:
            continue
        try:
            files = json.loads((other / MANIFEST).read_text())["files"]
        except (ValueError, KeyError):
            continue
        if first_wrong(other, files, files) is None:
            return f"{other} is whole: delete {path.name} to go on from there."
    return f"There is no other whole checkpoint in {path.parent}."
