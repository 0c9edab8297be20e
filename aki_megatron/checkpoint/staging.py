"""The folder of a conversion: written aside, renamed to its final name once it is complete, by one process at a time.

The parent of ``out`` holds ``.writing_NAME`` meanwhile: the folder that is written, and a file that the process holds
locked. The lock ends with the process, so a folder whose file is not locked was left by one that was killed.
"""

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from aki_megatron.checkpoint import files
from aki_megatron.errors import CheckpointError

LOCK, CONTENT = "lock", "content"
"""Inside ``.writing_NAME``: the locked file, and the folder that becomes ``out``."""

_ATTEMPTS = 20
"""To lock a folder that other processes create and remove at the same time."""


def _no_notice(_line: str) -> None:
    return None


@contextmanager
def staging_dir(out: Path, notify: Callable[[str], None] = _no_notice) -> Iterator[Path]:
    """A folder to write into, renamed to ``out`` if the block succeeds and removed if it fails.

    out     a path where nothing is, an empty folder, or a link to either, which is followed
    notify  takes a line about each folder that a killed conversion left beside ``out``

    Raises CheckpointError, before the block, where ``out`` is none of these, is a mount point, or is being written by
    another process; and after it where the disk is full.
    """
    named, out = out, Path(os.path.realpath(out))
    staging = out.parent / f"{files.WRITING}{out.name}"
    try:
        _check_target(out, named)
        with _locked(staging, named, notify):
            _try_rename(staging, out, named)
            content = staging / CONTENT
            content.mkdir()
            yield content
            files.sync_dir(content)
            content.replace(out)  # replaces an empty folder
            files.sync_dir(out.parent)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise CheckpointError(f"{named} was filled by something else meanwhile; choose another --out.") from None
        raise CheckpointError(f"{named} cannot be written: {error}. Nothing is left of it.") from None


def _check_target(out: Path, named: Path) -> None:
    if os.path.ismount(out):
        raise _mount_error(named)
    if out.is_symlink():
        raise CheckpointError(f"{named} is a link that leads nowhere but to itself; choose another --out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{named} exists and is not empty; choose another --out, or remove it first.")


def _mount_error(named: Path) -> CheckpointError:
    return CheckpointError(
        f"{named} is a mount point, which no finished folder can replace; choose a folder inside it: "
        f"--out {named / 'NAME'}."
    )


def _try_rename(staging: Path, out: Path, named: Path) -> None:
    """Rename an empty folder to an ``out`` that exists, as the finished one will be: a bind mount shows only here."""
    if out.exists():
        probe = staging / CONTENT
        probe.mkdir()
        try:
            probe.replace(out)
        except OSError as error:
            if error.errno in (errno.EBUSY, errno.EXDEV):
                raise _mount_error(named) from None
            raise


@contextmanager
def _locked(staging: Path, named: Path, notify: Callable[[str], None]) -> Iterator[None]:
    """Hold ``staging`` for this process alone, empty but for the lock; removed in the end."""
    lock = _lock(staging, named, notify)
    try:
        _name_leftovers(staging, notify)
        yield
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        lock.close()


def _lock(staging: Path, named: Path, notify: Callable[[str], None]) -> IO[str]:
    for _ in range(_ATTEMPTS):
        try:
            staging.mkdir(parents=True)
            is_new = True
        except FileExistsError:
            is_new = False
        try:
            lock = (staging / LOCK).open("a+", encoding="utf-8")
        except FileNotFoundError:  # its process has just removed the folder
            continue
        if not _take(lock) and not (is_new and _cannot_lock(lock)):
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            lock.close()
            raise CheckpointError(
                f"{named} is being written by another conversion ({owner}); wait for it, or choose another --out."
            )
        if not _is_same(lock, staging / LOCK):
            lock.close()
            continue
        if not is_new:
            _clear(staging)
            notify(f"removed {staging}, which a conversion that was killed left")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        return lock
    raise CheckpointError(f"{staging} appears and vanishes: other conversions write {named}; choose another --out.")


def _take(lock: IO[str]) -> bool:
    """Whether this process now holds the lock."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _cannot_lock(lock: IO[str]) -> bool:
    """Whether the file system has no locks; then a folder that is there already counts as being written."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return False


def _is_same(lock: IO[str], path: Path) -> bool:
    """Whether the locked file is still the one at ``path``."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _clear(staging: Path) -> None:
    for path in staging.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _name_leftovers(staging: Path, notify: Callable[[str], None]) -> None:
    """Name the folders of conversions to other names that were killed; those of checkpoints belong to runs."""
    for other in sorted(staging.parent.glob(f"{files.WRITING}*")):
        if other == staging or not (other / LOCK).is_file():
            continue
        with (other / LOCK).open("a", encoding="utf-8") as lock:
            if _take(lock):
                notify(f"{other} was left by a conversion that was killed; it can be removed")
