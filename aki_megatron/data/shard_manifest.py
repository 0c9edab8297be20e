"""The manifest of a set of tars: the index and the number of samples of each, at the cost of one stat per tar.

The counts of a folder's indices are kept in one manifest file beside them, so that a start reads that one file and
stats each tar: 10,000 tars take a second or so. What the manifest lacks is read from the index headers; a tar without
an index gets one. A manifest that is lost or stale costs time, never correctness.
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

from aki_megatron.data.shard_cache import ShardCache, command_digest
from aki_megatron.data.tar_index import SUFFIX, index_matches, index_path, read_header, write_atomically
from aki_megatron.data.tar_index_builder import IN_PROCESS_BYTES, IndexJob, build_indices
from aki_megatron.errors import DataError

MANIFEST = "tars.manifest"

Item = TypeVar("Item")
Result = TypeVar("Result")

_VERSION = 1
_NUM_THREADS, _CHUNK = 16, 128  # a network disk serves many requests at once, one at a time slowly


@dataclass(frozen=True)
class Shard:
    """One tar: a file, or a command that writes one; ``name`` begins the keys of its samples."""

    name: str
    tar: Path | None
    command: str = ""

    def __str__(self) -> str:
        return str(self.tar) if self.tar is not None else f"pipe:{self.command}"


class _IndexInfo(NamedTuple):
    path: Path
    num_samples: int
    num_readable: int


@dataclass(frozen=True)
class ShardManifest:
    """The index and the number of samples of every shard, and how many samples are readable by the index headers."""

    index_paths: list[Path]
    counts: NDArray[np.int64]
    num_readable: int


def stat_tars(shards: Sequence[Shard]) -> list[os.stat_result | None]:
    """Stat each tar; None where there is no such file, and for commands."""

    def stat_chunk(chunk: Sequence[Shard]) -> list[os.stat_result | None]:
        return [_stat(shard.tar) for shard in chunk]

    return _map_chunks(stat_chunk, shards)


def open_shard_manifest(
    shards: Sequence[Shard],
    stats: Sequence[os.stat_result | None],
    cache: ShardCache,
    *,
    num_workers: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> ShardManifest:
    """Return the indices of all shards; those that are missing or stale are built first. Raises DataError.

    stats        of ``stat_tars``
    num_workers  processes that build indices; ``progress`` gets a line every few seconds meanwhile
    """
    folders: dict[Path, _IndexFolder] = {}
    pairs = list(zip(shards, stats, strict=True))
    for shard, _ in pairs:
        for index in _candidates(shard, cache):
            if index.parent not in folders:
                folders[index.parent] = _IndexFolder(index.parent, cache)

    def find_chunk(chunk: Sequence[tuple[Shard, os.stat_result | None]]) -> list[_IndexInfo | None]:
        return [_find_index(shard, found, cache, folders) for shard, found in chunk]

    infos = _map_chunks(find_chunk, pairs)
    missing = [number for number, info in enumerate(infos) if info is None]
    if missing:
        jobs = [_index_job(shards[number], cache) for number in missing]
        sizes = [found.st_size for number in missing if (found := stats[number]) is not None]
        in_process = len(sizes) == len(jobs) and sum(sizes) < IN_PROCESS_BYTES
        build_indices(jobs, in_process=in_process, num_workers=num_workers, progress=progress)
        for number, job in zip(missing, jobs, strict=True):
            index = Path(job.index)
            folders[index.parent].names.add(index.name)
            infos[number] = _find_index(shards[number], _stat(shards[number].tar), cache, folders)
    for folder in folders.values():
        folder.save(progress)
    complete = [info for info in infos if info is not None]
    if len(complete) < len(infos):
        number = infos.index(None)
        raise DataError(f"Tar {shards[number]} changed while it was being indexed; wait until it is finished.")
    counts = np.fromiter((info.num_samples for info in complete), dtype=np.int64, count=len(complete))
    return ShardManifest([info.path for info in complete], counts, sum(info.num_readable for info in complete))


class _IndexFolder:
    """The indices of one folder: their names, and their entries in the manifest."""

    def __init__(self, folder: Path, cache: ShardCache) -> None:
        digest = blake2b(str(folder.absolute()).encode(), digest_size=12).hexdigest()
        # the second is for folders without write access
        self.manifests = (folder / MANIFEST, cache.indices / "manifests" / digest)
        self.names: set[str] = set()
        with suppress(OSError):  # the folder is created with the first index
            self.names = {entry.name for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)}
        self.entries: dict[str, tuple[int, int, int, int]] = {}
        for manifest in self.manifests if self.names else ():
            self.entries |= _read_manifest(manifest)
        self.changed = False

    def save(self, progress: Callable[[str], None] | None) -> None:
        """Write the manifest if it changed, where that is possible."""
        if not self.changed:
            return
        entries = {name: entry for name, entry in sorted(self.entries.items()) if name in self.names}
        data = json.dumps({"version": _VERSION, "tars": entries}).encode()
        for manifest in self.manifests:
            try:
                write_atomically(manifest, data)
                return
            except DataError as error:
                reason = error
        if progress is not None:
            progress(f"The counts of {len(entries):,} tars could not be saved, so every start will be slow: {reason}")


def _read_manifest(path: Path) -> dict[str, tuple[int, int, int, int]]:
    """Return index name -> (bytes of the tar, its mtime in ns, samples, readable ones); empty for any other file."""
    try:
        found = json.loads(path.read_bytes())
        if found["version"] != _VERSION:
            return {}
        return {str(name): (int(a), int(b), int(c), int(d)) for name, (a, b, c, d) in found["tars"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # no manifest, or a damaged one: the headers are read instead


def _candidates(shard: Shard, cache: ShardCache) -> list[Path]:
    """Return where a shard's index may be, the best path first."""
    if shard.tar is None:
        return [cache.indices / "fetched" / f"{command_digest(shard.command)}.tar{SUFFIX}"]
    mirrored = cache.indices / "elsewhere" / (os.path.abspath(shard.tar).lstrip("/") + SUFFIX)
    return [index_path(shard.tar), mirrored]


def _index_job(shard: Shard, cache: ShardCache) -> IndexJob:
    """Return the job that builds a shard's index."""
    beside, *others = _candidates(shard, cache)
    if others and not os.access(beside.parent, os.W_OK | os.X_OK):
        beside = others[0]
    return IndexJob(str(beside), str(shard.tar or ""), shard.command, str(cache.folder), cache.max_bytes)


def _find_index(
    shard: Shard, found: os.stat_result | None, cache: ShardCache, folders: dict[Path, _IndexFolder]
) -> _IndexInfo | None:
    """Return the index of a shard, if there is one that matches it."""
    for index in _candidates(shard, cache):
        folder = folders[index.parent]
        if index.name not in folder.names:
            continue
        entry = folder.entries.get(index.name)
        if entry is not None and (found is None or entry[:2] == (found.st_size, found.st_mtime_ns)):
            return _IndexInfo(index, entry[2], entry[3])
        header = read_header(index)
        if header is None:
            continue
        if shard.tar is not None:
            if found is None or not index_matches(header, shard.tar, found.st_size, found.st_mtime_ns):
                continue
            mtime_ns = found.st_mtime_ns
        else:
            mtime_ns = header.tar_mtime_ns
        folder.entries[index.name] = (header.tar_bytes, mtime_ns, header.num_samples, header.num_readable)
        folder.changed = True
        return _IndexInfo(index, header.num_samples, header.num_readable)
    return None


def _stat(tar: Path | None) -> os.stat_result | None:
    if tar is None:
        return None
    try:
        found = os.stat(tar)
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None


def _map_chunks(function: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """Apply ``function`` to all items in order, in chunks on several threads if there are many."""
    if len(items) <= _CHUNK:
        return function(items)
    chunks = [items[first : first + _CHUNK] for first in range(0, len(items), _CHUNK)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        return [result for results in pool.map(function, chunks) for result in results]
