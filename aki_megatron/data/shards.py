"""Webdataset tars with random access: the only door to webdataset.

A sample is a run of members that share a name up to its first dot: ``000012.jpg`` (or png, jpeg), ``000012.txt`` and,
optionally, ``000012.json``. Where they lie is read from an index file beside each tar (tar_index.py), which is made
when it is missing (index_build.py); tars named by a command are fetched into a local folder first (fetch.py).
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
from aki_megatron.data.fetch import ShardCache, command_name
from aki_megatron.data.shard_manifest import Shard, open_catalog, stat_tars
from aki_megatron.data.tar_index import IndexFile, tar_digest
from aki_megatron.data.tar_scan import Entry, Extent
from aki_megatron.errors import DataError
from aki_megatron.types import Caption

PIPE = "pipe:"

_OPEN_TARS = 64
_GAP_BYTES = 2**16  # members closer than this are read at once: a second question costs a network disk more


class ShardIndex:
    """Captions of the tars that the patterns name, in order. Braces expand as in webdataset: ``{00000..00007}.tar``.

    Relative patterns start at ``root``; ``pipe:COMMAND`` is a tar that a command writes to its output. Missing tars
    raise one DataError that lists them. Tars without an index get one now, which several processes share; ``progress``
    gets a line every few seconds meanwhile. A sample without text or image, and the place where a tar is cut off, stay
    in the index as entries that raise DataError (tar and key) on access, so that a stream can count and replace them.

    Safe to share between threads and to be inherited or pickled by worker processes.
    """

    def __init__(
        self,
        patterns: Sequence[str],
        root: Path,
        *,
        form: TextFormat | None = None,
        cache: ShardCache | None = None,
        workers: int | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.root = root
        self.form = form or TextFormat()
        self.shards = name_shards(patterns, root)
        self._cache = cache or ShardCache()
        stats = stat_tars(self.shards)
        if missing := _absent(self.shards, stats):
            listing = "\n  ".join(missing)
            raise DataError(f"Tars of the shards {list(patterns)} do not exist (root {root}):\n  {listing}")
        catalog = open_catalog(self.shards, stats, self._cache, workers=workers, progress=progress)
        self.counts: NDArray[np.int64] = catalog.counts
        """Samples of each tar."""
        self._indices = catalog.indices
        self._starts = np.concatenate(([0], np.cumsum(catalog.counts)))
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        if not catalog.readable:
            reasons = " ".join(self._fault(number) for number in range(min(3, len(self))))
            raise DataError(f"No readable sample in {len(self.shards)} tars of {list(patterns)}. {reasons}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Caption:
        return self.caption(index)

    def caption(self, index: int, *, picture: bool = True) -> Caption:
        """Sample number ``index``, its key ``shard/key``; DataError names tar and key if it is incomplete or not UTF-8.

        Without ``picture`` only the text is read, as measuring its length needs; the image is then empty.
        Raises IndexError outside of 0 ... len-1.
        """
        number, shard, entry = self._locate(index)
        where = f"Tar {self.shards[number]}, key {entry.key}"
        raw, *image = shard.read(entry, entry.text, *[entry.image] * picture)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: the text is not UTF-8: {error}") from error
        key = f"{self.shards[number].name}/{entry.key}"
        return Caption(key, caption_text(text, self.form, where=where), image[0] if image else b"")

    def metadata(self, index: int) -> bytes | None:
        """The json member of a sample; None if it has none. Raises as ``caption`` does."""
        _, shard, entry = self._locate(index)
        return shard.read(entry, entry.json)[0] if entry.json.size else None

    def close(self) -> None:
        """Close the tars that are open. TokenSegments opens them again."""
        with self._lock:
            self._open.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open, self._lock = OrderedDict(), threading.Lock()

    def _locate(self, index: int) -> "tuple[int, _OpenShard, Entry]":
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        shard = self._shard(number)
        entry = shard.index.entry(index - int(self._starts[number]))
        if entry.fault:
            raise DataError(f"Tar {self.shards[number]}, key {entry.key or '(first)'}: {entry.fault}")
        return number, shard, entry

    def _shard(self, number: int) -> "_OpenShard":
        with self._lock:
            shard = self._open.get(number)
            if shard is not None:
                self._open.move_to_end(number)
                return shard
        shard = _OpenShard(self.shards[number], self._indices[number], int(self.counts[number]), self._cache)
        with self._lock:
            self._open[number] = shard
            while len(self._open) > _OPEN_TARS:
                self._open.popitem(last=False)  # closes with the last thread that reads it
        return shard

    def _fault(self, index: int) -> str:
        try:
            self.caption(index)
        except DataError as error:
            return str(error)
        return ""


class _OpenShard:
    """One tar and its index, open; closed when nobody holds it any more.

    The tar is held against what its index was made of at every read: a tar that was replaced or is being written to
    would give bytes of another sample.
    """

    def __init__(self, shard: Shard, index: Path, samples: int, cache: ShardCache) -> None:
        self.shard = shard
        self.index = IndexFile(index)
        if self.index.header.samples != samples:
            raise DataError(f"Index {index} of {shard} was replaced since the run started; start again.")
        if shard.tar is None:
            self._handle = cache.open(shard.command, self.index.header.tar_bytes)
        else:
            try:
                self._handle = os.open(shard.tar, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"Tar {shard.tar} cannot be opened: {error}") from error
        self._proven_time: int | None = None

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, entry: Entry, *extents: Extent) -> list[bytes]:
        """The bytes of some members of a sample. Raises DataError (tar and key)."""
        try:
            if reason := self._changed():
                raise DataError(f"Tar {self.shard}, key {entry.key}: {reason}")
            first = min(extent.offset for extent in extents)
            span = max(extent.offset + extent.size for extent in extents) - first
            if span <= sum(extent.size for extent in extents) + _GAP_BYTES:
                data = memoryview(os.pread(self._handle, span, first))
                parts = [bytes(data[extent.offset - first :][: extent.size]) for extent in extents]
            else:
                parts = [os.pread(self._handle, extent.size, extent.offset) for extent in extents]
        except OSError as error:
            raise DataError(f"Tar {self.shard}, key {entry.key}: {error}") from error
        if [len(part) for part in parts] != [extent.size for extent in extents]:
            raise DataError(f"Tar {self.shard}, key {entry.key}: cut off; the tar became shorter while it was read.")
        return parts

    def _changed(self) -> str:
        """Why the tar is not the one that was indexed; empty if it is."""
        found, header = os.fstat(self._handle), self.index.header
        if found.st_size != header.tar_bytes:
            how = "cut off" if found.st_size < header.tar_bytes else "replaced"
            return f"{how}; the tar has {found.st_size} bytes and had {header.tar_bytes} when the run started."
        if found.st_mtime_ns in (header.tar_time, self._proven_time):
            return ""
        if tar_digest(self._handle, found.st_size) != header.digest:
            return "replaced; the tar has another content than its index was made of. Start again."
        self._proven_time = found.st_mtime_ns
        return ""


def expand_shards(patterns: Sequence[str], root: Path) -> list[Path]:
    """The tars that brace patterns name, in order, whether they exist or not; DataError where there is no pattern.

    A command has no path: DataError.
    """
    shards = name_shards(patterns, root)
    for shard in shards:
        if shard.tar is None:
            raise DataError(f"{shard} is a command, not a file; a run that reads it fetches and indexes it itself.")
    return [shard.tar for shard in shards if shard.tar is not None]


def name_shards(patterns: Sequence[str], root: Path) -> list[Shard]:
    """The files and commands that brace patterns name, in order; DataError where there is no pattern."""
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
            else:
                tar = root / name
                below = tar.relative_to(root) if tar.is_relative_to(root) else tar
                shards.append(Shard(below.with_suffix("").as_posix(), tar))
    return shards


def missing_shards(patterns: Sequence[str], root: Path) -> list[str]:
    """The tars that do not exist, the first ten by name. Commands are not run."""
    shards = name_shards(patterns, root)
    return _absent(shards, stat_tars(shards))


def _absent(shards: Sequence[Shard], stats: Sequence[os.stat_result | None]) -> list[str]:
    pairs = zip(shards, stats, strict=True)
    missing = [str(shard) for shard, found in pairs if found is None and shard.tar is not None]
    rest = [f"... and {len(missing) - 10:,} more of {len(shards):,} tars"] if len(missing) > 10 else []
    return missing[:10] + rest
