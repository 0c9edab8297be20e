"""The index file beside a tar: where every sample's bytes lie, so that any sample is read without looking for it.

``00000.tar.index`` is, all little-endian:

    header    96 bytes: magic, format version, bytes per record, size of the tar, its modification time (ns),
              digest, number of samples, number of readable samples, bytes of strings, zeros
    records   56 bytes per sample (RECORD), readable with numpy.memmap
    strings   UTF-8: keys, and the reasons of samples that cannot be read

An index belongs to a tar of the same size and the same modification time; where only the time differs (the dataset was
copied) the digest decides, which is taken of 16 blocks spread over the tar and so costs 16 small reads.
"""

import os
import struct
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.tar_scan import Entry, Extent, scan
from aki_megatron.errors import DataError

SUFFIX = ".index"
VERSION = 1

RECORD = np.dtype(
    [
        ("text_offset", "<u8"),
        ("image_offset", "<u8"),
        ("json_offset", "<u8"),
        ("text_size", "<u4"),
        ("image_size", "<u4"),
        ("json_size", "<u4"),
        ("key_offset", "<u4"),
        ("fault_offset", "<u4"),
        ("key_size", "<u2"),
        ("fault_size", "<u2"),
        ("suffix", "S4"),
        ("reserved", "<u4"),
    ]
)
"""One sample. Offsets of text, image and json count from the start of the tar (json_size 0: none), those of key and
fault from the start of the strings; a sample with fault_size > 0 cannot be read."""

_RECORD = struct.Struct("<QQQIIIIIHH4sI")
_HEADER = struct.Struct("<8sIIQq16sQQQ24x")
_MAGIC = b"AKITARIX"
_DIGEST_BLOCKS, _DIGEST_BLOCK_BYTES = 16, 4096
_LONGEST_STRING = 2**16 - 1

assert _RECORD.size == RECORD.itemsize == 56 and _HEADER.size == 96


class Header(NamedTuple):
    """What an index says about its tar."""

    tar_bytes: int
    tar_time: int
    """Modification time in nanoseconds."""
    digest: bytes
    samples: int
    readable: int
    strings_bytes: int


def index_path(tar: Path) -> Path:
    """Where a tar's index lies: beside it."""
    return tar.with_name(tar.name + SUFFIX)


def write_index(tar: Path, index: Path | None = None, *, whole: bool = False) -> int:
    """Read a tar's headers through and write its index (beside it, or at ``index``); returns the number of samples.

    The file appears at once or not at all, so readers and other writers need no lock. With ``whole`` a tar that is cut
    off is an error instead of an entry. Raises DataError for a file that cannot be read or changes meanwhile.
    """
    index = index or index_path(tar)
    try:
        handle = os.open(tar, os.O_RDONLY)
        try:
            before = os.fstat(handle)
            entries = list(scan(tar))
            digest = tar_digest(handle, before.st_size)
        finally:
            os.close(handle)
        after = tar.stat()
    except OSError as error:
        raise DataError(f"Tar {tar} cannot be read: {error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"Tar {tar} was written to while it was being indexed; wait until it is finished.")
    if whole and entries and entries[-1].torn:
        raise DataError(f"Tar {tar}, key {entries[-1].key or '(first)'}: {entries[-1].fault}")
    write_entries(index, entries, tar_bytes=before.st_size, tar_time=before.st_mtime_ns, digest=digest)
    return len(entries)


def write_entries(index: Path, entries: Iterable[Entry], *, tar_bytes: int, tar_time: int, digest: bytes) -> None:
    """Write an index of the given samples, atomically. Raises DataError where its folder cannot be written."""
    records, strings, readable = bytearray(), bytearray(), 0
    samples = 0
    for entry in entries:
        key, fault = (_short(text) for text in (entry.key, entry.fault))
        places = len(strings), len(strings) + len(key)
        strings += key + fault
        extents = (entry.text, entry.image, entry.json)
        records += _RECORD.pack(
            *(extent.offset for extent in extents), *(extent.size for extent in extents),
            *places, len(key), len(fault), entry.suffix.encode(), 0,
        )  # fmt: skip
        samples += 1
        readable += not entry.fault
    header = _HEADER.pack(
        _MAGIC, VERSION, _RECORD.size, tar_bytes, tar_time, digest, samples, readable, len(strings)
    )  # fmt: skip
    write_atomically(index, header + records + strings)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all. Raises DataError naming the file."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # or a crash could leave zeros under the final name
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def tar_digest(handle: int, size: int) -> bytes:
    """16 bytes that tell a tar from another one of the same size: of blocks spread evenly, first and last included."""
    digest = blake2b(digest_size=16)
    last = max(0, size - _DIGEST_BLOCK_BYTES)
    for number in range(_DIGEST_BLOCKS):
        digest.update(os.pread(handle, _DIGEST_BLOCK_BYTES, last * number // (_DIGEST_BLOCKS - 1)))
    return digest.digest()


def read_header(index: Path) -> Header | None:
    """The header of an index; None where there is none, or one that is malformed, cut off or of another version."""
    try:
        handle = os.open(index, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _header(handle)
    except OSError:
        return None
    finally:
        os.close(handle)


def belongs(header: Header, tar: Path, size: int, time: int) -> bool:
    """Whether an index is that of the tar, whose size and modification time (ns) are given."""
    if header.tar_bytes != size:
        return False
    if header.tar_time == time:
        return True
    try:
        handle = os.open(tar, os.O_RDONLY)
    except OSError:
        return False
    try:
        return tar_digest(handle, size) == header.digest
    finally:
        os.close(handle)


def read_records(index: Path) -> NDArray[np.void]:
    """All records of an index, mapped (RECORD). Raises DataError where the index is missing or malformed."""
    header = read_header(index)
    if header is None:
        raise _gone(index)
    if not header.samples:
        return np.zeros(0, dtype=RECORD)
    return np.memmap(index, dtype=RECORD, mode="r", offset=_HEADER.size, shape=(header.samples,))


class IndexFile:
    """An open index: samples by number, two small reads each. Raises DataError where it is missing or malformed.

    Read with pread, not mapped: a mapped file that somebody cuts short kills the process with a bus error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
            header = _header(self._handle)
        except OSError as error:
            raise DataError(f"Index {path} cannot be read: {error}; start again and it is made anew.") from error
        if header is None:
            raise _gone(path)
        self.header = header
        self._strings = _HEADER.size + header.samples * _RECORD.size

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def entry(self, number: int) -> Entry:
        """Sample ``number`` of the tar, from 0."""
        assert 0 <= number < self.header.samples, (number, self.header.samples)
        record = _RECORD.unpack(self._read(_RECORD.size, _HEADER.size + number * _RECORD.size))
        (text, image, json), sizes, (key, fault, key_size, fault_size, suffix, _) = record[:3], record[3:6], record[6:]
        return Entry(
            self._read(key_size, self._strings + key).decode("utf-8", "replace"),
            Extent(text, sizes[0]),
            Extent(image, sizes[1]),
            Extent(json, sizes[2]),
            suffix.rstrip(b"\0").decode("ascii", "replace"),
            self._read(fault_size, self._strings + fault).decode("utf-8", "replace") if fault_size else "",
        )

    def _read(self, size: int, offset: int) -> bytes:
        try:
            data = os.pread(self._handle, size, offset)
        except OSError as error:
            raise DataError(f"Index {self.path} cannot be read: {error}") from error
        if len(data) != size:
            raise _gone(self.path)
        return data


def _header(handle: int) -> Header | None:
    data = os.pread(handle, _HEADER.size, 0)
    if len(data) < _HEADER.size:
        return None
    magic, version, record_bytes, *fields = _HEADER.unpack(data)
    header = Header(*fields)
    if (magic, version, record_bytes) != (_MAGIC, VERSION, _RECORD.size):
        return None
    whole = _HEADER.size + header.samples * _RECORD.size + header.strings_bytes
    return header if os.fstat(handle).st_size == whole else None


def _short(text: str) -> bytes:
    """At most 64 KiB of UTF-8, cut between characters."""
    return text.encode("utf-8", "backslashreplace")[:_LONGEST_STRING].decode("utf-8", "ignore").encode()


def _gone(index: Path) -> DataError:
    return DataError(f"Index {index} is missing, malformed or cut off; delete it and start again, it is made anew.")
