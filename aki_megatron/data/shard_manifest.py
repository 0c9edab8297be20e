"""The manifest of a set of tars: index, number of samples and fingerprint of each, at the cost of one stat per tar.

What the headers of a folder's indices say is kept in one manifest file beside them, so that a start reads that one
file and stats each tar: 10,000 tars take a second or so. What the manifest lacks is read from the index headers; a tar
without an index gets one. A manifest that is lost or stale costs time, never correctness.

A tar that is not of its index's time was copied, or edited in place. Up to VERIFIED_SAMPLES samples of such tars are
compared with their indices; of larger sets only the 16 blocks of ``tar_digest``.
"""

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.fingerprint import Part
from aki_megatron.data.shard_cache import ShardCache, command_digest, display_name
from aki_megatron.data.tar_index import (
    SUFFIX,
    index_matches,
    index_path,
    read_header,
    samples_match,
    write_atomically,
)
from aki_megatron.data.tar_index_builder import IN_PROCESS_BYTES, IndexJob, build_indices
from aki_megatron.errors import DataError

MANIFEST = "tars.manifest"

VERIFIED_SAMPLES = 1_000_000
"""Samples of copied tars that a start verifies at most: some ten seconds."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_VERSION = 3
_NUM_THREADS, _CHUNK = 16, 128  # a network disk serves many requests at once, one at a time slowly


@dataclass(frozen=True)
class Shard:
    """One tar: a file, or a command or a URL that gives one; ``name`` begins the keys of its samples."""

    name: str
    tar: Path | None
    command: str = ""

    def __str__(self) -> str:
        return str(self.tar) if self.tar is not None else display_name(self.command)


class _Entry(NamedTuple):
    """What a manifest holds of one tar."""

    tar_bytes: int
    tar_mtime_ns: int
    num_samples: int
    num_readable: int
    is_damaged: int
    digest: str


class _IndexInfo(NamedTuple):
    path: Path
    entry: _Entry
    is_copy: bool = False
    """Whether only the 16 blocks of the digest say that the tar is the one that was indexed."""


@dataclass(frozen=True)
class ShardManifest:
    """Of every shard the index, the number of samples, how many of them are readable, and the fingerprint.

    is_damaged  whether the tar is cut off, malformed or no tar
    """

    index_paths: list[Path]
    counts: NDArray[np.int64]
    num_readable: NDArray[np.int64]
    is_damaged: NDArray[np.bool_]
    fingerprints: list[Part]


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
    for number in _find_edited(shards, infos):
        _discard(infos[number], folders)
        infos[number] = _find_index(*pairs[number], cache, folders)
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
    entries = [info.entry for info in complete]
    fingerprints = [
        Part(entry.digest, {"samples": entry.num_samples}, str(shard))
        for entry, shard in zip(entries, shards, strict=True)
    ]
    return ShardManifest(
        [info.path for info in complete],
        counts=np.array([entry.num_samples for entry in entries], dtype=np.int64),
        num_readable=np.array([entry.num_readable for entry in entries], dtype=np.int64),
        is_damaged=np.array([entry.is_damaged for entry in entries], dtype=np.bool_),
        fingerprints=fingerprints,
    )


def _find_edited(shards: Sequence[Shard], infos: Sequence[_IndexInfo | None]) -> list[int]:
    """Return the numbers of the tars whose samples are not those of their index, though its digest matches."""
    copies = [(number, info) for number, info in enumerate(infos) if info is not None and info.is_copy]
    if sum(info.entry.num_samples for _, info in copies) > VERIFIED_SAMPLES:
        return []

    def verify_chunk(chunk: Sequence[tuple[int, _IndexInfo]]) -> list[int]:
        tars = ((number, info.path, shards[number].tar) for number, info in chunk)
        return [number for number, index, tar in tars if tar is not None and not samples_match(index, tar)]

    return _map_chunks(verify_chunk, copies)


def _discard(info: _IndexInfo | None, folders: Mapping[Path, "_IndexFolder"]) -> None:
    """Remove an index that is not that of its tar; where the folder cannot be written, this start ignores it."""
    assert info is not None
    folder = folders[info.path.parent]
    folder.names.discard(info.path.name)
    folder.entries.pop(info.path.name, None)
    with suppress(OSError):
        info.path.unlink()


class _IndexFolder:
    """The indices of one folder: their names, and their entries in the manifest."""

    def __init__(self, folder: Path, cache: ShardCache) -> None:
        digest = blake2b(str(folder.absolute()).encode(), digest_size=12).hexdigest()
        # the second is for folders without write access
        self.manifests = (folder / MANIFEST, cache.indices / "manifests" / digest)
        self.names: set[str] = set()
        with suppress(OSError):  # the folder is created with the first index
            self.names = {entry.name for entry in os.scandir(folder) if entry.name.endswith(SUFFIX)}
        self.entries: dict[str, _Entry] = {}
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


def _read_manifest(path: Path) -> dict[str, _Entry]:
    """Return the entries by the names of the indices; empty for any other file."""
    try:
        found = json.loads(path.read_bytes())
        if found["version"] != _VERSION:
            return {}
        return {
            str(name): _Entry(int(a), int(b), int(c), int(d), int(e), str(digest))
            for name, (a, b, c, d, e, digest) in found["tars"].items()
        }
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
            return _IndexInfo(index, entry)
        header = read_header(index)
        if header is None:
            continue
        if shard.tar is not None:
            if found is None or not index_matches(header, shard.tar, found.st_size, found.st_mtime_ns):
                continue
            mtime_ns = found.st_mtime_ns
        else:
            mtime_ns = header.tar_mtime_ns
        digest = header.samples_digest.hex()
        counts = header.num_samples, header.num_readable, header.is_damaged
        entry = _Entry(header.tar_bytes, mtime_ns, *counts, digest)
        folder.entries[index.name] = entry
        folder.changed = True
        return _IndexInfo(index, entry, is_copy=mtime_ns != header.tar_mtime_ns)
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
