"""Check that a run folder can be used, before anything of a run is built."""

import errno
import os
import uuid
from pathlib import Path

from aki_megatron.errors import ConfigError
from aki_megatron.supervise.run_paths import RunPaths

OS_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "it is not a folder",
    errno.ELOOP: "its symbolic links go round in a circle",
}
"""Errors that a bad path or a full disk causes -> what they mean."""

PROBE_BYTES = 2**16


def describe_os_error(error: OSError) -> str:
    """Return what an error of the file system means."""
    return OS_ERRORS.get(error.errno or 0, error.strerror or str(error))


def check_run_dir(paths: RunPaths) -> None:
    """Raise ConfigError where the path of the run folder can be none; creates nothing."""
    try:
        paths.path.stat()
    except FileNotFoundError:
        if not paths.path.is_symlink():
            return
        reason = ""
    except (OSError, ValueError) as error:
        reason = _text(error)
    else:
        if paths.path.is_dir():
            return
        reason = ""
    raise ConfigError(f"run.dir={paths.path}: {_cause(paths.path, reason)}; choose another --run.dir.")


def open_run_folder(paths: RunPaths) -> None:
    """Create the run folder and its folder of logs where they are missing, and write to both; on every rank.

    Raises ConfigError that names the path and what is wrong with it.
    """
    for folder in (paths.path, paths.logs):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe_{uuid.uuid4().hex}"
            try:
                probe.write_bytes(bytes(PROBE_BYTES))
            finally:
                probe.unlink(missing_ok=True)
        except OSError as error:
            text = f"run.dir={paths.path}: {_cause(folder, _text(error))}; choose another --run.dir."
            raise ConfigError(text) from error


def _text(error: OSError | ValueError) -> str:
    return describe_os_error(error) if isinstance(error, OSError) else str(error)  # ValueError: a null character


def _cause(folder: Path, reason: str) -> str:
    """Return what is wrong with a folder, which ``reason`` alone may not tell."""
    for path in (folder, *folder.parents):
        # functions of os.path answer False where those of Path raise, as for a name that is too long
        if os.path.islink(path) and not os.path.exists(path):
            return f"{path} is a symbolic link to {path.readlink()}, which does not exist"
        if os.path.exists(path) and not os.path.isdir(path):
            return f"{path} is a file, not a folder"
    return f"{folder} cannot be used: {reason}"
