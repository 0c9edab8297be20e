"""Checkpoint files on disk: complete or not there at all, and checked before anything in them is read."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aki_megatron.flow import CheckpointError

MANIFEST, LATEST, PREFIX = "manifest.json", "latest", "step_"
"""A folder without a manifest is no checkpoint; ``latest`` holds the name of the newest one."""


def folder_name(step: int) -> str:
    """step_000100"""
    return f"{PREFIX}{step:06d}"


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))


def newest(folder: Path) -> Path | None:
    """What ``latest`` points to; the highest step where it points to nothing."""
    pointer = folder / LATEST
    if pointer.is_file() and (named := folder / pointer.read_text().strip()) in checkpoints(folder):
        return named
    return next(reversed(checkpoints(folder)), None)


def digest(path: Path) -> dict[str, Any]:
    """Manifest entry of a file: bytes and sha256."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write and force to disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def publish(aside: Path, name: str) -> None:
    """Rename a finished folder to ``name``, replacing one of that name, then move ``latest``."""
    folder, target = aside.parent, aside.parent / name
    sync_folder(aside)
    if target.exists():
        replaced = folder / f".replaced_{name}"
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
        aside.rename(target)
        shutil.rmtree(replaced)
    else:
        aside.rename(target)
    sync_folder(folder)
    pointer = folder / f".{LATEST}"
    with pointer.open("w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    pointer.rename(folder / LATEST)
    sync_folder(folder)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all checkpoints but the ``count`` newest; a half-removed one is none, since its manifest goes first."""
    current = newest(folder)
    for path in checkpoints(folder)[:-count]:
        if path != current:
            (path / MANIFEST).unlink()
            shutil.rmtree(path)


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
