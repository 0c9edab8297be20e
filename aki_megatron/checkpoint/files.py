"""Checkpoint folders: published atomically, and verified before anything in them is read.

A folder of checkpoints holds ``step_000100`` and so on, ``latest``, maybe ``best``, and temporary folders whose names
begin with a dot, which no reader takes for a checkpoint: ``.writing_`` is being written, ``.removing_`` is being
removed, and ``.replaced_`` stands in for the checkpoint of its step while a new one of the same step takes its place.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aki_megatron.errors import CheckpointError

FORMAT = 2
"""Version of the checkpoint format. Version 1, whose manifests name no format, has other tensor and config names."""

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints inside a run folder."""

MANIFEST, LATEST, BEST, PREFIX = "manifest.json", "latest", "best", "step_"
"""A folder without a manifest is not a checkpoint; ``latest`` holds the name of the newest one, ``best`` that of the
one with the lowest validation loss, where a run keeps it."""

TOKENIZER = "tokenizer"
"""Folder inside a checkpoint that holds the tokenizer of its run, or of the conversion that wrote it."""

INDEX, EXTRA, CONFIG = ".metadata", "extra.json", "config.yaml"
"""torch's index of the tensors; training state other than tensors; the configuration of the run or of the model."""

WRITING, REMOVING, REPLACED = ".writing_", ".removing_", ".replaced_"

BLOCK_BYTES = 2**22
"""Size of the blocks in which files are read for hashing."""


def checkpoint_name(step: int) -> str:
    """``step_000100`` for 100."""
    return f"{PREFIX}{step:06d}"


def step_of(path: Path) -> int:
    """100 for ``step_000100``."""
    return int(path.name.removeprefix(REPLACED).removeprefix(PREFIX))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    found += [path for path in folder.glob(f"{REPLACED}*") if not (folder / path.name.removeprefix(REPLACED)).exists()]
    return sorted((path for path in found if (path / MANIFEST).is_file()), key=step_of)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that ``latest`` names; where it names none, the one of the highest step."""
    found = list_checkpoints(folder)
    name = _read_name(folder / LATEST)
    return next((path for path in found if path.name == name), next(reversed(found), None))


def best_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that ``best`` names; None where it names none that exists."""
    name = _read_name(folder / BEST)
    return next((path for path in list_checkpoints(folder) if path.name == name), None)


def _read_name(pointer: Path) -> str:
    """What ``latest`` or ``best`` holds; empty where it is missing or damaged."""
    try:
        return pointer.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``: a checkpoint, the file ``latest`` or ``best``, a folder of them, or a run folder.

    Raises CheckpointError when there is none.
    """
    if (path / MANIFEST).is_file() or path.name.startswith(PREFIX):
        return path
    if path.name in (LATEST, BEST) and path.is_file() and (path.parent / _read_name(path) / MANIFEST).is_file():
        return path.parent / _read_name(path)
    for folder in (path / CHECKPOINTS, path):
        if found := latest_checkpoint(folder):
            return found
    text = f"No complete checkpoint in {path}: looked for {PREFIX}*/{MANIFEST} there and in its folder {CHECKPOINTS}."
    for folder in (path / CHECKPOINTS, path):
        if writing := next(folder.glob(f"{WRITING}*"), None):
            text += f" {writing.name.removeprefix(WRITING)} is being written, or its run was killed meanwhile."
    raise CheckpointError(text)


def file_digest(path: Path) -> dict[str, Any]:
    """The manifest entry of a file: size in bytes and sha256."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            sha256.update(block)
            size += len(block)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def write_text(path: Path, content: str) -> None:
    """Write a text file and force it to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file and force it to disk."""
    write_text(path, json.dumps(content, indent=1))


def sync_dir(folder: Path) -> None:
    """Force a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def create_staging_dir(folder: Path, step: int) -> Path:
    """Create the temporary folder of the checkpoint of ``step``; remove what killed processes left behind."""
    for stale in (*folder.glob(f"{WRITING}*"), *folder.glob(f"{REMOVING}*")):
        shutil.rmtree(stale)
    for replaced in folder.glob(f"{REPLACED}*"):
        name = replaced.name.removeprefix(REPLACED)
        if (folder / name).exists():
            _remove(replaced)
        else:
            replaced.rename(folder / name)
    staging = folder / f"{WRITING}{checkpoint_name(step)}"
    staging.mkdir(parents=True)
    return staging


def finalize(staging: Path, step: int, written: Mapping[str, Any]) -> Path:
    """Write the manifest of a staging folder and publish it as the checkpoint of ``step``; return its path.

    written  manifest entries of files that were read back after writing; the other files are hashed here

    Raises CheckpointError when a file of ``written`` is absent here or of another size.
    """
    for name, entry in written.items():
        found = (staging / name).stat().st_size if (staging / name).is_file() else "no"
        if found != entry["bytes"]:
            raise CheckpointError(
                f"{staging / name} has {found} bytes here instead of the {entry['bytes']} that were written: the "
                "folder must lie on a file system that all ranks share"
            )
    others = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
    listed = dict(written) | {name: file_digest(staging / name) for name in others if name not in written}
    write_json(staging / MANIFEST, {"format": FORMAT, "step": step, "files": listed})
    return publish(staging, checkpoint_name(step))


def publish(staging: Path, name: str) -> Path:
    """Rename a complete folder to ``name``, replacing one of that name, then update ``latest``."""
    folder, target = staging.parent, staging.parent / name
    sync_dir(staging)
    if target.exists():
        replaced = folder / f"{REPLACED}{name}"
        target.rename(replaced)
        staging.rename(target)
        sync_dir(folder)
        _remove(replaced)
    else:
        staging.rename(target)
    sync_dir(folder)
    _write_name(folder / LATEST, name)
    return target


def name_best(folder: Path, step: int) -> None:
    """Let ``best`` name the checkpoint of ``step``, which is complete."""
    if _read_name(folder / BEST) != checkpoint_name(step):
        _write_name(folder / BEST, checkpoint_name(step))


def _write_name(pointer: Path, name: str) -> None:
    temporary = pointer.with_name(f".{pointer.name}")
    write_text(temporary, name + "\n")
    temporary.rename(pointer)
    sync_dir(pointer.parent)


def prune(folder: Path, *, keep_last: int, keep_every: int) -> None:
    """Remove old checkpoints.

    Keep the newest ``keep_last``, those of a multiple of ``keep_every`` steps (0: none), and what ``latest`` and
    ``best`` name.
    """
    named = (latest_checkpoint(folder), best_checkpoint(folder))
    for path in list_checkpoints(folder)[:-keep_last]:
        if path not in named and not (keep_every and step_of(path) % keep_every == 0):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that a half-removed one is not taken for a checkpoint."""
    doomed = path.parent / f"{REMOVING}{checkpoint_name(step_of(path))}"
    path.rename(doomed)
    shutil.rmtree(doomed)


def read_manifest(path: Path, *, version: int | None = FORMAT) -> dict[str, Any]:
    """The files of a checkpoint by name, with the size in bytes and sha256 of each.

    version  the format the checkpoint must have; None accepts any

    Raises CheckpointError when ``path`` is not a complete checkpoint of that format.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is no folder. {fallback_hint(path)}")
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        listed, found = manifest["files"], manifest.get("format", 1)
        assert isinstance(listed, dict) and isinstance(found, int)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} holds no {MANIFEST}, so it is not a complete checkpoint. {fallback_hint(path)}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError):
        raise CheckpointError(f"{path / MANIFEST} is corrupt. {fallback_hint(path)}") from None
    if CONFIG not in listed:
        raise CheckpointError(
            f"{path} was written before checkpoints held their {CONFIG}; use the version of this project that wrote it."
        )
    if version is not None and found != version:
        raise _format_error(path, found, version)
    return listed


def _format_error(path: Path, found: int, expected: int) -> CheckpointError:
    if found < expected:
        return CheckpointError(
            f"{path} has checkpoint format {found}, of an earlier version of this project, and format {expected} is "
            f"read here: convert it once with python tools/convert.py upgrade {path} --out NEW_FOLDER"
        )
    if found == FORMAT:
        return CheckpointError(f"{path} has checkpoint format {found}, the current one: it needs no upgrade.")
    return CheckpointError(
        f"{path} has checkpoint format {found} and format {expected} is read here: use the newer version of this "
        "project that wrote it."
    )


def verify(path: Path, names: Iterable[str], manifest: Mapping[str, Any]) -> None:
    """Compare the named files of a checkpoint with its manifest.

    Raises CheckpointError that names the first file that differs and the checkpoint to fall back to.
    """
    if damage := find_damage(path, names, manifest):
        raise CheckpointError(f"{damage}. {fallback_hint(path)}")


def find_damage(folder: Path, names: Iterable[str], manifest: Mapping[str, Any]) -> str | None:
    """Describe the first of the named files that is missing or differs from the manifest; None where all agree."""
    for name in names:
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        found = file_digest(file)
        if found["bytes"] != manifest[name]["bytes"]:
            return f"{file} has {found['bytes']} bytes instead of {manifest[name]['bytes']}"
        if found["sha256"] != manifest[name]["sha256"]:
            return f"{file} is corrupt: its sha256 is not that of the manifest"
    return None


def fallback_hint(path: Path) -> str:
    """A sentence that names the newest intact checkpoint beside ``path``."""
    for other in reversed(list_checkpoints(path.parent)):
        if other.name == path.name:
            continue
        try:
            listed = json.loads((other / MANIFEST).read_text())["files"]
        except (ValueError, KeyError):
            continue
        if find_damage(other, listed, listed) is None:
            return f"{other} is intact: delete {path.name} to go on from there."
    return f"There is no other intact checkpoint in {path.parent}."
