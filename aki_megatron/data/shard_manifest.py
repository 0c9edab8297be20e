"""Which index belongs to which tar, and how many samples each has, at the price of one look at every tar.

The counts of a folder's indices are kept in one manifest beside them, so that a start reads that one file and asks the
size and time of each tar: 10,000 tars take a second or so. What the manifest does not know is looked up in the index
headers; what has no index gets one. A manifest that is lost or stale costs time, never correctness.
"""

import json
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.fetch import ShardCache, command_digest
from aki_megatron.data.index_build import SMALL_BYTES, Job, make_indices
from aki_megatron.data.tar_index import SUFFIX, belongs, index_path, read_header, write_atomically
from aki_megatron.errors import DataError

MANIFEST = "tars.manifest"

Item = TypeVar("Item")
Result = TypeVar("Result")

_VERSION = 1
_THREADS, _CHUNK = 16, 128  # a network disk answers many questions at once, one at a time slowly


@dataclass(frozen=True)
class Shard:
    """One tar: a file, or a command that writes one; ``name`` begins the keys of its samples."""

    name: str
    tar: Path | None
    command: str = ""

    def __str__(self) -> str:
        return str(self.tar) if self.tar is not None else f"pipe:{self.command}"


class Known(NamedTuple):
    """What is known of one index."""

    path: Path
    samples: int
    readable: int


@dataclass(frozen=True)
class Catalog:
    """For every shard: its index, its number of samples, and how many of these are readable (as far as headers say)."""

    indices: list[Path]
    counts: NDArray[np.int64]
    readable: int


def stat_tars(shards: Sequence[Shard]) -> list[os.stat_result | None]:
    """Size and time of each tar; None where there is no such file, and for commands."""

    def look(some: Sequence[Shard]) -> list[os.stat_result | None]:
        return [_stat(shard.tar) for shard in some]

    return _spread(look, shards)


def open_catalog(
    shards: Sequence[Shard],
    stats: Sequence[os.stat_result | None],
    cache: ShardCache,
    *,
    workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Catalog:
    """The indices of all shards; those that are missing or stale are made first. Raises DataError."""
    folders: dict[Path, _Folder] = {}
    pairs = list(zip(shards, stats, strict=True))
    for shard, _ in pairs:
        for index in _candidates(shard, cache):
            if index.parent not in folders:
                folders[index.parent] = _Folder(index.parent, cache)

    def look(some: Sequence[tuple[Shard, os.stat_result | None]]) -> list[Known | None]:
        return [_find(shard, found, cache, folders) for shard, found in some]

    known = _spread(look, pairs)
    lacking = [number for number, found in enumerate(known) if found is None]
    if lacking:
        jobs = [_job(shards[number], cache) for number in lacking]
        sizes = [found.st_size for number in lacking if (found := stats[number]) is not None]
        small = len(sizes) == len(jobs) and sum(sizes) < SMALL_BYTES
        make_indices(jobs, small=small, workers=workers, progress=progress)
        for number, job in zip(lacking, jobs, strict=True):
            index = Path(job.index)
            folders[index.parent].names.add(index.name)
            known[number] = _find(shards[number], _stat(shards[number].tar), cache, folders)
    for folder in folders.values():
        folder.save(progress)
    good = [one for one in known if one is not None]
    if len(good) < len(known):
        number = known.index(None)
        raise DataError(f"Tar {shards[number]} changed while it was being indexed; wait until it is finished.")
    counts = np.fromiter((one.samples for one in good), dtype=np.int64, count=len(good))
    return Catalog([one.path for one in good], counts, sum(one.readable for one in good))


class _Folder:
    """Indices that lie in one folder: their names, and what the manifest says of them."""

    def __init__(self, folder: Path, cache: ShardCache) -> None:
        digest = blake2b(str(folder.absolute()).encode(), digest_size=12).hexdigest()
        # the second is for folders without write access
        self.manifests = (folder / MANIFEST, cache.indices / "manifests" / digest)
        self.names: set[str] = set()
        with suppress(OSError):  # the folder is made when the first index is
            self.names = {entry.name for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)}
        self.rows: dict[str, tuple[int, int, int, int]] = {}
        for manifest in self.manifests if self.names else ():
            self.rows |= _read_manifest(manifest)
        self.changed = False

    def save(self, progress: Callable[[str], None] | None) -> None:
        """Write what was learnt, where that is possible."""
        if not self.changed:
            return
        rows = {name: row for name, row in sorted(self.rows.items()) if name in self.names}
        data = json.dumps({"version": _VERSION, "tars": rows}).encode()
        for manifest in self.manifests:
            try:
                write_atomically(manifest, data)
                return
            except DataError as error:
                reason = error
        if progress is not None:
            progress(f"The counts of {len(rows):,} tars could not be kept, so every start will be slow: {reason}")


def _read_manifest(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """Index name -> (size of the tar, time of the tar in ns, samples, readable); empty for any other file."""
    try:
        found = json.loads(path.read_bytes())
        if found["version"] != _VERSION:
            return {}
        return {str(name): (int(a), int(b), int(c), int(d)) for name, (a, b, c, d) in found["tars"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # no manifest, or a damaged one: the headers are read instead


def _candidates(shard: Shard, cache: ShardCache) -> list[Path]:
    """Where a shard's index may lie, the best place first."""
    if shard.tar is None:
        return [cache.indices / "fetched" / f"{command_digest(shard.command)}.tar{SUFFIX}"]
    mirrored = cache.indices / "elsewhere" / (os.path.abspath(shard.tar).lstrip("/") + SUFFIX)
    return [index_path(shard.tar), mirrored]


def _job(shard: Shard, cache: ShardCache) -> Job:
    """What has to be done for a shard's index."""
    beside, *others = _candidates(shard, cache)
    if others and not os.access(beside.parent, os.W_OK | os.X_OK):
        beside = others[0]
    return Job(str(beside), str(shard.tar or ""), shard.command, str(cache.folder), cache.max_bytes)


def _find(shard: Shard, found: os.stat_result | None, cache: ShardCache, folders: dict[Path, _Folder]) -> Known | None:
    """The index of a shard, if there is one that belongs to it."""
    for index in _candidates(shard, cache):
        folder = folders[index.parent]
        if index.name not in folder.names:
            continue
        row = folder.rows.get(index.name)
        if row is not None and (found is None or row[:2] == (found.st_size, found.st_mtime_ns)):
            return Known(index, row[2], row[3])
        header = read_header(index)
        if header is None:
            continue
        if shard.tar is not None:
            if found is None or not belongs(header, shard.tar, found.st_size, found.st_mtime_ns):
                continue
            time = found.st_mtime_ns
        else:
            time = header.tar_time
        folder.rows[index.name] = (header.tar_bytes, time, header.samples, header.readable)
        folder.changed = True
        return Known(index, header.samples, header.readable)
    return None


def _stat(tar: Path | None) -> os.stat_result | None:
    if tar is None:
        return None
    try:
        found = os.stat(tar)
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _spread(look: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """``look`` at all items in order, many at once if there are many."""
    if len(items) <= _CHUNK:
        return look(items)
    parts = [items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [result for part in pool.map(look, parts) for result in part]
