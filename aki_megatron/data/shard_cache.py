"""Cache tars that a command writes to its output (``pipe:aws s3 cp s3://bucket/00000.tar -``) in a local folder.

A URL (``https://host/00000.tar``) is opened by webdataset's gopen, in a process of its own. Commands are run here:
gopen keeps neither their error output nor a time limit, and it leaves their children running.

A tar is fetched whole before it is read, by one process of a machine for all of them (file locks; so the folder belongs
on a local disk), and appears under its name only when it is complete. The least recently used tars are evicted.
"""

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

from aki_megatron.errors import DataError

DEFAULT_MAX_BYTES = 100 * 10**9

_NUM_LOCKS = 256
_STALE_PARTIAL_SECONDS = 24 * 3600
_FAILURE_TTL_SECONDS = 60.0
_MAX_ERROR_CHARACTERS = 2000
_URL = re.compile(r"[a-z][a-z0-9+.-]*://\S+$")
_OPEN_URL = """
import shutil, sys
from webdataset.gopen import gopen
try:
    stream = gopen(sys.argv[1])
    shutil.copyfileobj(stream, sys.stdout.buffer, 2**20)
    stream.close()  # raises what its program reported
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
_USER_OF_URL = re.compile(r"://[^/@\s]*@")


class ShardCache:
    """Fetched tars in ``folder`` (by default below the user's cache folder), at most ``max_bytes`` of them.

    Those being fetched, and those still open when they are evicted, come on top.

    ``indices`` below it holds the indices of fetched tars and of tars in folders without write access. A failed
    command is run ``max_attempts`` times, then reported; and reported again for a minute without being run, so that a
    stream that counts bad samples is not held up by each of a tar's 10,000 samples.
    """

    def __init__(
        self,
        folder: Path | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        *,
        max_attempts: int = 3,
        retry_delay_seconds: float = 1.0,
        timeout_seconds: float = 3600.0,
    ) -> None:
        assert max_bytes > 0 and max_attempts >= 1, (max_bytes, max_attempts)
        self.folder = folder or default_folder()
        self.max_bytes = max_bytes
        self.max_attempts, self.retry_delay_seconds = max_attempts, retry_delay_seconds
        self.timeout_seconds = timeout_seconds
        self._failed: dict[str, tuple[float, str]] = {}

    @property
    def indices(self) -> Path:
        """Return the folder of indices."""
        return self.folder / "indices"

    def tar_path(self, command: str) -> Path:
        """Return the path of a command's tar, fetched or not."""
        return self.folder / "tars" / f"{command_digest(command)}.tar"

    def open(self, command: str, tar_bytes: int | None = None) -> int:
        """Return a file descriptor of the command's tar, fetched if need be; its size is checked where it is known.

        Raises DataError with the command, its exit code and the end of its error output.
        """
        for _ in range(8):  # another process may evict it between fetching and opening
            path = self.fetch(command, tar_bytes)
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise DataError(f"The fetched tar {path} of {display_name(command)} cannot be read: {error}") from error
        raise DataError(
            f"The fetched tar of {display_name(command)} is always removed before it is opened: {self.max_bytes:,} "
            "bytes of cache hold too few tars for the processes that share them; allow more (data.cache_gigabytes)."
        )

    def fetch(self, command: str, tar_bytes: int | None = None) -> Path:
        """Return the path as ``open`` would open it; another process may remove the file at any time after this."""
        path = self.tar_path(command)
        if self._is_cached(path, tar_bytes):
            return path
        when, reason = self._failed.get(command, (0.0, ""))
        if reason and time.monotonic() - when < _FAILURE_TTL_SECONDS:
            raise DataError(reason)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(int(command_digest(command)[:8], 16) % _NUM_LOCKS):
                if not self._is_cached(path, tar_bytes):
                    self._evict(tar_bytes or 0)
                    self._run_with_retries(command, path, tar_bytes)
                    self._evict(0, keep=path)
        except OSError as error:
            raise DataError(
                f"The cache {self.folder} cannot hold the tar of {display_name(command)}: {error}"
            ) from error
        except DataError as error:
            self._failed[command] = (time.monotonic(), str(error))
            raise
        return path

    def fetch_index(self, command: str, target: Path) -> bool:
        """Run the command with ``.tar.index`` for ``.tar``; return whether it wrote something to ``target``.

        With an index published beside its tar, the tar need not be fetched just to count its samples.
        """
        if command.count(".tar") != 1:
            return False
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if _run(command.replace(".tar", ".tar.index"), partial, self.timeout_seconds) or not partial.stat().st_size:
                return False
            os.replace(partial, target)
            return True
        except OSError:
            return False  # the tar itself is fetched next, and its error is reported
        finally:
            partial.unlink(missing_ok=True)

    def discard(self, command: str) -> None:
        """Remove the command's tar, so that it is fetched again when it is next needed."""
        self.tar_path(command).unlink(missing_ok=True)

    def _is_cached(self, path: Path, tar_bytes: int | None) -> bool:
        """Return whether the tar is there in the expected size, and mark it as just used."""
        try:
            found = path.stat()
            if tar_bytes is not None and found.st_size != tar_bytes:
                return False  # an earlier version of the tar, whose index was built anew since
            os.utime(path, ns=(time.time_ns(), found.st_mtime_ns))  # set the access time: disks are mounted noatime
        except OSError:
            return False
        return True

    def _run_with_retries(self, command: str, path: Path, tar_bytes: int | None) -> None:
        """Run the command until it succeeds, ``max_attempts`` times at most, and move its output into place."""
        partial = path.with_suffix(".partial")  # no other process uses it: this one holds the lock
        try:
            for attempt in range(1, self.max_attempts + 1):
                reason = _run(command, partial, self.timeout_seconds)
                size = partial.stat().st_size
                if not reason and not size:
                    reason = f"{display_name(command)} succeeded but wrote nothing."
                if not reason and tar_bytes is not None and size != tar_bytes:
                    reason = (
                        f"{display_name(command)} wrote {size} bytes, its index says {tar_bytes}: the tar was cut off "
                        f"on the way or replaced at its source. If it was replaced, delete its index below "
                        f"{self.indices}."
                    )
                if not reason:
                    with partial.open("rb") as file:
                        os.fsync(file.fileno())
                    os.replace(partial, path)
                    return
                if attempt < self.max_attempts:
                    time.sleep(self.retry_delay_seconds * attempt)
            raise DataError(f"{reason} Tried {self.max_attempts} times.")
        finally:
            partial.unlink(missing_ok=True)

    def _evict(self, wanted_bytes: int, keep: Path | None = None) -> None:
        """Remove tars, the least recently used first, until ``wanted_bytes`` more fit."""
        with self._lock(_NUM_LOCKS):
            found = []
            for entry in os.scandir(self.folder / "tars"):
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.name.endswith(".tar"):
                    found.append((stat.st_atime_ns, stat.st_size, entry.path))
                elif entry.name.endswith(".partial") and time.time() - stat.st_mtime > _STALE_PARTIAL_SECONDS:
                    Path(entry.path).unlink(missing_ok=True)  # its process was killed
            total = wanted_bytes + sum(size for _, size, _ in found)
            for _, size, path in sorted(found):
                if total <= self.max_bytes:
                    return
                if keep is None or path != str(keep):
                    Path(path).unlink(missing_ok=True)
                    total -= size

    @contextmanager
    def _lock(self, number: int) -> Iterator[None]:
        folder = self.folder / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f"{number:03}", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def default_folder() -> Path:
    """Return where tars and indices are kept by default."""
    try:
        return Path.home() / ".cache" / "aki_megatron"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"aki_megatron_{os.getuid()}"


def is_url(command: str) -> bool:
    """Return whether what is fetched is named by a URL rather than by a command."""
    return _URL.match(command) is not None


def display_name(command: str) -> str:
    """Return a command or a URL as the shard patterns name it."""
    return command if is_url(command) else f"pipe:{command}"


def command_digest(command: str) -> str:
    """Return a file name for what a command fetches."""
    return blake2b(command.encode(), digest_size=12).hexdigest()


def command_name(command: str) -> str:
    """Return the name of a command's tar in keys and errors: its only argument that ends in .tar, or a digest.

    A user and password in a URL are left out.
    """
    arguments = [_USER_OF_URL.sub("://", part.strip("\"'")) for part in command.split()]
    tars = [part.removesuffix(".tar") for part in arguments if part.endswith(".tar") and len(part) > len(".tar")]
    return tars[0] if len(tars) == 1 else f"pipe-{command_digest(command)}"


def _run(command: str, target: Path, timeout_seconds: float) -> str:
    """Run a command in the shell with its output into ``target``; return why it failed, or an empty string."""
    arguments = [sys.executable, "-c", _OPEN_URL, command] if is_url(command) else ["/bin/sh", "-c", command]
    with target.open("wb") as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            return f"{display_name(command)} did not finish in {timeout_seconds:g} seconds and was stopped."
        finally:
            if process.poll() is None:  # timed out, or this process is being stopped: kill the shell and its children
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if not code:
            return ""
        errors.seek(0)
        tail = errors.read().decode("utf-8", "replace").strip()[-_MAX_ERROR_CHARACTERS:]
        return f"{display_name(command)} failed with exit code {code}: {tail or '(no error output)'}"
