"""Read webdataset tars with random access. With shard_writer.py the only adapter of webdataset.

A sample is a run of members that share a name up to its first dot: ``000012.jpg`` (or png, webp ...), ``000012.txt``
and, optionally, ``000012.json`` (tar_scan.py). Their offsets are read from an index file beside each tar
(tar_index.py), which is built when it is missing (tar_index_builder.py); tars named by a command are fetched into a
local folder first (shard_cache.py).
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.shardlists import expand_urls

from aki_megatron.data.captions import TextFormat, caption_text
from aki_megatron.data.fingerprint import Fingerprint, tars_fingerprint
from aki_megatron.data.shard_cache import ShardCache, command_name, is_url
from aki_megatron.data.shard_manifest import Shard, open_shard_manifest, stat_tars
from aki_megatron.data.tar_damage import absent_samples, tar_damage
from aki_megatron.data.tar_index import TarIndex, sample_location, tar_digest
from aki_megatron.data.tar_members import ByteRange
from aki_megatron.data.tar_scan import TarSample
from aki_megatron.errors import DataError
from aki_megatron.types import Caption

PIPE = "pipe:"

MAX_REPORTED = 50
"""Tars with unreadable samples that a start names one by one."""

_MAX_OPEN_TARS = 64
_MAX_LISTED = 3
_MAX_GAP_BYTES = 2**16  # members closer than this are read at once: a second request costs a network disk more


class CaptionDataset:
    """Captions of the tars that the patterns name, in order. Braces expand as in webdataset: ``{00000..00007}.tar``.

    Relative patterns start at ``root``; ``pipe:COMMAND`` is a tar that a command writes to its output; URLs are
    opened as webdataset opens them (http, https, ftps, sftp, gs, hf, ais). Missing tars
    raise one DataError that lists them; with ``skip_missing`` they are left out and reported. Tars without an index get
    one now, which several processes share; ``progress`` gets a line every few seconds meanwhile, and one for every tar
    with unreadable samples. An unreadable sample (without text or image, or lost in a damaged tar) stays in the dataset
    as an item that raises DataError (tar and key) on access, so that a stream can count and replace it.

    Safe to share between threads and to be inherited or pickled by worker processes.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        root: Path,
        *,
        text_format: TextFormat | None = None,
        cache: ShardCache | None = None,
        num_workers: int | None = None,
        progress: Callable[[str], None] | None = None,
        skip_missing: bool = False,
    ) -> None:
        report = progress or (lambda line: None)
        self.root = root
        self.text_format = text_format or TextFormat()
        self._cache = cache or ShardCache()
        self.shards, stats = _existing_shards(patterns, root, report if skip_missing else None)
        manifest = open_shard_manifest(self.shards, stats, self._cache, num_workers=num_workers, progress=progress)
        absent = absent_samples([shard.tar for shard in self.shards], manifest.counts, manifest.is_damaged)
        self.counts: NDArray[np.int64] = manifest.counts + absent
        """Samples of each tar, readable or not; with those that a tar lost where it is cut off, as far as known."""
        self.fingerprint: Fingerprint = tars_fingerprint(manifest.fingerprints, int(manifest.counts.sum()))
        self._found, self._index_paths = manifest.counts, manifest.index_paths
        self._starts = np.concatenate(([0], np.cumsum(self.counts)))
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._report_damage(patterns, manifest.num_readable, absent, report)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Caption:
        return self.caption(index)

    def caption(self, index: int, *, with_image: bool = True) -> Caption:
        """Return sample number ``index``, its key ``shard/key``.

        Without ``with_image`` only the text is read, as measuring its length needs; the image is then empty.
        Raises DataError, which names tar and key, if it is incomplete or not UTF-8; IndexError outside of 0 ... len-1.
        """
        number, shard, sample = self._locate(index)
        location = sample_location(self.shards[number], sample.key)
        raw, *image = shard.read(sample, sample.text, *[sample.image] * with_image)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{location}: the text is not UTF-8: {error}") from error
        key = f"{self.shards[number].name}/{sample.key}"
        return Caption(key, caption_text(text, self.text_format, location=location), image[0] if image else b"")

    def location(self, index: int) -> str:
        """Return how messages name sample number ``index``: by tar and key. Raises DataError as ``caption`` does."""
        number, _, sample = self._locate(index)
        return sample_location(self.shards[number], sample.key)

    def close(self) -> None:
        """Close the tars that are open. Reading opens them again."""
        with self._lock:
            self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = OrderedDict(), threading.Lock()

    def _report_damage(
        self,
        patterns: Sequence[str],
        num_readable: NDArray[np.int64],
        absent: NDArray[np.int64],
        report: Callable[[str], None],
    ) -> None:
        """Report the tars with unreadable samples. Raises DataError where no sample is readable."""
        bad = np.flatnonzero((num_readable < self.counts) | (self.counts == 0)).tolist()
        damages = [tar_damage(self.shards[n], self._index_paths[n], int(absent[n])) for n in bad[:MAX_REPORTED]]
        lines = [f"  {damage}" for damage in damages]
        if not num_readable.sum():
            listing = "\n".join(lines[:_MAX_LISTED])
            raise DataError(f"No readable sample in {len(self.shards):,} tars of {list(patterns)}:\n{listing}")
        if bad:
            report(
                f"{len(bad):,} of the {len(self.shards):,} tars of {list(patterns)} hold unreadable samples: "
                f"{int(self.counts.sum() - num_readable.sum()):,} of {int(self.counts.sum()):,} samples in all, "
                "which count as bad samples whenever they are drawn (data.max_bad_fraction)."
            )
            for line in lines:
                report(line)
            if len(bad) > len(lines):
                report(f"  ... and {len(bad) - len(lines):,} more; all are named by: python tools/make_data.py index")

    def _locate(self, index: int) -> "tuple[int, _OpenShard, TarSample]":
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard, within = self._shard(number), index - int(self._starts[number])
        if within >= self._found[number]:
            raise DataError(f"Tar {self.shards[number]}: sample number {within} was lost where the tar is cut off.")
        sample = shard.index.sample(within)
        if sample.error:
            raise DataError(f"{sample_location(self.shards[number], sample.key)}: {sample.error}")
        return number, shard, sample

    def _shard(self, number: int) -> "_OpenShard":
        with self._lock:
            shard = self._open.get(number)
            if shard is not None:
                self._open.move_to_end(number)
                return shard
        shard = _OpenShard(self.shards[number], self._index_paths[number], int(self._found[number]), self._cache)
        with self._lock:
            self._open[number] = shard
            while len(self._open) > _MAX_OPEN_TARS:
                self._open.popitem(last=False)  # closes with the last thread that reads it
        return shard


class _OpenShard:
    """One tar and its index, open; closed when it is no longer referenced.

    The tar is checked against its index at every read: a tar that was replaced or is being written to would give bytes
    of another sample.
    """

    def __init__(self, shard: Shard, index: Path, num_samples: int, cache: ShardCache) -> None:
        self.shard = shard
        self.index = TarIndex(index)
        if self.index.header.num_samples != num_samples:
            raise DataError(f"Index {index} of {shard} was replaced since the run started; start again.")
        if shard.tar is None:
            self._handle = cache.open(shard.command, self.index.header.tar_bytes)
        else:
            try:
                self._handle = os.open(shard.tar, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"Tar {shard.tar} cannot be opened: {error}") from error
        self._verified_mtime_ns: int | None = None

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, sample: TarSample, *members: ByteRange) -> list[bytes]:
        """Return the bytes of some members of a sample. Raises DataError (tar and key)."""
        try:
            if reason := self._find_change():
                raise DataError(f"Tar {self.shard}, key {sample.key}: {reason}")
            first = min(member.offset for member in members)
            span = max(member.offset + member.size for member in members) - first
            if span <= sum(member.size for member in members) + _MAX_GAP_BYTES:
                data = memoryview(os.pread(self._handle, span, first))
                parts = [bytes(data[member.offset - first :][: member.size]) for member in members]
            else:
                parts = [os.pread(self._handle, member.size, member.offset) for member in members]
        except OSError as error:
            raise DataError(f"Tar {self.shard}, key {sample.key}: {error}") from error
        if [len(part) for part in parts] != [member.size for member in members]:
            raise DataError(f"Tar {self.shard}, key {sample.key}: cut off; the tar became shorter while it was read.")
        return parts

    def _find_change(self) -> str:
        """Return why the tar is not the one that was indexed; empty if it is."""
        found, header = os.fstat(self._handle), self.index.header
        if found.st_size != header.tar_bytes:
            how = "cut off" if found.st_size < header.tar_bytes else "replaced"
            return f"{how}; the tar has {found.st_size} bytes and had {header.tar_bytes} when the run started."
        if found.st_mtime_ns in (header.tar_mtime_ns, self._verified_mtime_ns):
            return ""
        if tar_digest(self._handle, found.st_size) != header.digest:
            return "replaced; the tar has another content than its index was built from. Start again."
        self._verified_mtime_ns = found.st_mtime_ns
        return ""


def expand_shards(patterns: Sequence[str], root: Path) -> list[Path]:
    """Return the tars that brace patterns name, in order, whether they exist or not.

    Raises DataError where there is no pattern, and for a command, which has no path.
    """
    shards = parse_patterns(patterns, root)
    for shard in shards:
        if shard.tar is None:
            raise DataError(f"{shard} is no file; a run that reads it fetches and indexes it itself.")
    return [shard.tar for shard in shards if shard.tar is not None]


def parse_patterns(patterns: Sequence[str], root: Path) -> list[Shard]:
    """Return the files and commands that brace patterns name, in order. Raises DataError where there is no pattern."""
    if not patterns:
        raise DataError("No shards given, for example captions/{00000..00007}.tar.")
    shards = []
    for pattern in patterns:
        for name in expand_urls(pattern):
            if name.startswith(PIPE):
                command = name.removeprefix(PIPE).strip()
                if not command:
                    raise DataError(f"The shard {pattern!r} has no command after {PIPE}")
                shards.append(Shard(command_name(command), None, command))
            elif is_url(name):
                shards.append(Shard(command_name(name), None, name))
            else:
                tar = root / name
                below = tar.relative_to(root) if tar.is_relative_to(root) else tar
                shards.append(Shard(below.with_suffix("").as_posix(), tar))
    return shards


def _existing_shards(
    patterns: Sequence[str], root: Path, report_skipped: Callable[[str], None] | None
) -> tuple[list[Shard], list[os.stat_result | None]]:
    """Return the shards and their stats. Missing tars raise DataError, or are left out where the report is given."""
    shards = parse_patterns(patterns, root)
    stats = stat_tars(shards)
    missing = _list_missing(shards, stats)
    if not missing:
        return shards, stats
    if report_skipped is None:
        listing, hint = "\n  ".join(missing), wildcard_hint(patterns)
        raise DataError(
            f"Tars of the shards {list(patterns)} do not exist (root {root}){hint}:\n  {listing}\nFetch them, or "
            "leave out what is missing with skip_missing: true of the caption set."
        )
    kept = [(shard, found) for shard, found in zip(shards, stats, strict=True) if found is not None or shard.command]
    if not kept:
        raise DataError(f"None of the {len(shards):,} tars of {list(patterns)} exists (root {root}).")
    report_skipped(
        f"{len(shards) - len(kept):,} of the {len(shards):,} tars of {list(patterns)} do not exist and are left out "
        f"(skip_missing): {', '.join(missing)}"
    )
    return [shard for shard, _ in kept], [found for _, found in kept]


def wildcard_hint(patterns: Sequence[str]) -> str:
    """Return what to say about patterns of missing tars that have wildcards; empty where they have none."""
    if any(set(pattern) & set("*?[") for pattern in patterns):
        return ". Wildcards are not expanded here; write {00000..00007}.tar"
    return ""


def missing_shards(patterns: Sequence[str], root: Path) -> list[str]:
    """Return the tars that do not exist, the first ten by name. Commands are not run."""
    shards = parse_patterns(patterns, root)
    return _list_missing(shards, stat_tars(shards))


def _list_missing(shards: Sequence[Shard], stats: Sequence[os.stat_result | None]) -> list[str]:
    pairs = zip(shards, stats, strict=True)
    missing = [shard.tar for shard, found in pairs if found is None and shard.tar is not None]
    rest = [f"... and {len(missing) - 10:,} more of {len(shards):,} tars"] if len(missing) > 10 else []
    return [f"{tar} (a folder)" if tar.is_dir() else str(tar) for tar in missing[:10]] + rest
