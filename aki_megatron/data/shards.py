"""Webdataset tars with random access: the only door to webdataset.

A sample is a run of members that share a name up to its first dot: ``000012.jpg`` (or png, jpeg) and
``000012.txt``; a json member is ignored. Each tar is read through once, headers only, when the index is built.
"""

import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from webdataset.shardlists import expand_urls

from aki_megatron.flow import Caption, DataError

IMAGE_SUFFIXES = ("jpg", "png", "jpeg")
TEXT_SUFFIX = "txt"
_OPEN_TARS = 64


class _Extent(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


class _Entry(NamedTuple):
    """One sample: shard number, key, its two members; or, where ``fault`` is set, why it cannot be read."""

    shard: int
    key: str
    text: _Extent
    image: _Extent
    fault: str


class ShardIndex:
    """Captions of the tars that the patterns name, in order. Braces expand as in webdataset: ``{00000..00007}.tar``.

    Relative patterns start at ``root``. Missing tars raise one DataError that lists them. A sample without text
    or image, and the place where a tar is cut off, stay in the index as entries that raise DataError (tar and key)
    on access, so that a stream can count and replace them.
    """

    def __init__(self, patterns: Sequence[str], root: Path) -> None:
        self.root = root
        self.tars = expand_shards(patterns, root)
        if missing := missing_shards(patterns, root):
            listing = "\n  ".join(missing)
            raise DataError(f"Tars of data.shards={list(patterns)} do not exist (data.root={root}):\n  {listing}")
        self._entries: list[_Entry] = []
        for shard, tar in enumerate(self.tars):
            self._entries.extend(_read_index(shard, tar))
        self._open: dict[int, int] = {}
        if all(entry.fault for entry in self._entries):
            reasons = "; ".join(entry.fault for entry in self._entries[:3])
            raise DataError(f"No readable sample in {len(self.tars)} tars of {list(patterns)}. {reasons}")

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Caption:
        return self.caption(index)

    def caption(self, index: int) -> Caption:
        """Sample number ``index``, its key ``shard/key``; DataError names both if it is incomplete or not UTF-8."""
        entry = self._entries[index]
        if entry.fault:
            raise DataError(entry.fault)
        tar = self.tars[entry.shard]
        shard = tar.relative_to(self.root) if tar.is_relative_to(self.root) else tar
        key = f"{shard.with_suffix('').as_posix()}/{entry.key}"
        try:
            text = self._read(entry, entry.text).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"Tar {tar}, key {entry.key}: the text is not UTF-8: {error}") from error
        return Caption(key, text, self._read(entry, entry.image))

    def close(self) -> None:
        """Close the tars that are open. Reading opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def _read(self, entry: _Entry, extent: _Extent) -> bytes:
        tar = self.tars[entry.shard]
        try:
            handle = self._open.get(entry.shard)
            if handle is None:
                if len(self._open) >= _OPEN_TARS:
                    os.close(self._open.pop(next(iter(self._open))))
                handle = self._open[entry.shard] = os.open(tar, os.O_RDONLY)
            data = os.pread(handle, extent.size, extent.offset)
        except OSError as error:
            raise DataError(f"Tar {tar}, key {entry.key}: {error}") from error
        if len(data) != extent.size:
            raise DataError(f"Tar {tar}, key {entry.key}: cut off; the tar became shorter since the run started.")
        return data


def expand_shards(patterns: Sequence[str], root: Path) -> list[Path]:
    """The tars that brace patterns name, in order, whether they exist or not; DataError where there is no pattern."""
    if not patterns:
        raise DataError("No shards given (data.shards), for example captions/{00000..00007}.tar.")
    return [root / name for pattern in patterns for name in expand_urls(pattern)]


def missing_shards(patterns: Sequence[str], root: Path) -> list[str]:
    """The tars that do not exist, the first ten by name."""
    tars = expand_shards(patterns, root)
    missing = [str(tar) for tar in tars if not tar.is_file()]
    rest = [f"... and {len(missing) - 10:,} more of {len(tars):,} tars"] if len(missing) > 10 else []
    return missing[:10] + rest


def _read_index(shard: int, tar: Path) -> Iterator[_Entry]:
    """The samples of one tar."""
    nothing = _Extent(0, 0)
    key, members = "", dict[str, _Extent]()
    for name, extent, fault in _members(tar):
        if fault:
            yield from _complete(shard, tar, key, members)
            yield _Entry(shard, name, nothing, nothing, f"Tar {tar}, key {name or '(first)'}: {fault}")
            return
        folder, slash, base = name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if f"{folder}{slash}{stem}" != key:
            yield from _complete(shard, tar, key, members)
            key, members = f"{folder}{slash}{stem}", {}
        members[suffix.lower()] = extent
    yield from _complete(shard, tar, key, members)


def _members(tar: Path) -> Iterator[tuple[str, _Extent, str]]:
    """(name, extent, "") for every file of a tar; where it is cut off or malformed, one last (key, -, fault)."""
    nothing = _Extent(0, 0)
    size = tar.stat().st_size
    last = ""
    end = 0
    try:
        with tarfile.open(tar, "r:") as opened:
            while (member := opened.next()) is not None:
                last = member.name.partition(".")[0] if "/" not in member.name else member.name.rpartition(".")[0]
                end = member.offset_data + member.size
                if end > size:
                    yield last, nothing, f"the tar is cut off inside {member.name} ({end} bytes needed, {size} there)."
                    return
                if member.isfile():
                    yield member.name, _Extent(member.offset_data, member.size), ""
    except (tarfile.TarError, OSError, EOFError) as error:
        yield last, nothing, f"the tar is malformed or cut off after this key: {error}"
        return
    if size < -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE:
        yield last, nothing, "the tar has no end mark; it was cut off after this key."


def _complete(shard: int, tar: Path, key: str, members: dict[str, _Extent]) -> Iterator[_Entry]:
    """The entry of a finished run of members, if there was one."""
    if not members:
        return
    image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    text = members.get(TEXT_SUFFIX)
    if image is None or text is None:
        lacking = " and ".join(what for what, there in (("txt", text), ("jpg, png or jpeg", image)) if there is None)
        fault = f"Tar {tar}, key {key}: no {lacking} member (found: {', '.join(sorted(members))})."
        yield _Entry(shard, key, _Extent(0, 0), _Extent(0, 0), fault)
    else:
        yield _Entry(shard, key, text, image, "")
