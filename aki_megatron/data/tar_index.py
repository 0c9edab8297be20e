"""The index file beside a tar: where every sample's bytes are, so that any sample is read without a search.

``00000.tar.index`` is, all little-endian:

    header    96 bytes: magic (8), format version (4), bytes per record (4), size of the tar (8), its modification time
              in ns (8), digest of the tar (16), number of samples (8), number of readable samples (8), bytes of strings
              (8), digest of the samples (16), whether the tar is damaged: cut off, malformed, no tar (8; 0 or 1)
    records   56 bytes per sample: offsets of text, image and json in the tar (8 each), sizes of text, image and json
              (4 each; json 0: none), offsets of key and error in the strings (4 each), sizes of key and error (2 each;
              error > 0: unreadable), suffix of the image (4), whether the tar is damaged here (4; 0 or 1)
    strings   UTF-8: keys, and the errors of samples that cannot be read

An index belongs to a tar of the same size and the same modification time; where only the time differs (the dataset was
copied) the digest of the tar decides, which is taken of 16 blocks spread over it and so costs 16 small reads.
The digest of the samples costs reads of every sample; it is the fingerprint of a tar's content.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

from aki_megatron.data.tar_members import ByteRange
from aki_megatron.data.tar_scan import TarSample, scan_tar
from aki_megatron.errors import DataError

SUFFIX = ".index"
VERSION = 3

_RECORD = struct.Struct("<QQQIIIIIHH4sI")
_HEADER = struct.Struct("<8sIIQq16sQQQ16sQ")
_MAGIC = b"AKITARIX"
_DIGEST_BLOCKS, _DIGEST_BLOCK_BYTES = 16, 4096
_IMAGE_EDGE_BYTES = 512
_MAX_STRING_BYTES = 2**16 - 1
_RECORDS_AT_ONCE = 4096
_ERROR_SIZE_FIELD = 9

assert _RECORD.size == 56 and _HEADER.size == 96


class IndexHeader(NamedTuple):
    """The header of an index: what it says about its tar."""

    tar_bytes: int
    tar_mtime_ns: int
    digest: bytes
    num_samples: int
    num_readable: int
    strings_bytes: int
    samples_digest: bytes
    is_damaged: int


def index_path(tar: Path) -> Path:
    """Return the path of a tar's index: beside the tar."""
    return tar.with_name(tar.name + SUFFIX)


def sample_location(tar: object, key: str) -> str:
    """Return how messages name a sample of a tar; the tar alone where a file is no tar and so has no key."""
    return f"Tar {tar}, key {key}" if key else f"Tar {tar}"


def write_index(tar: Path, index: Path | None = None, *, require_complete: bool = False) -> int:
    """Scan a tar and write its index (beside it, or at ``index``); return the number of samples.

    The file appears whole or not at all, so readers and other writers need no lock. With ``require_complete`` a tar
    that is damaged is an error instead of unreadable samples.
    Raises DataError for a file that cannot be read or changes meanwhile.
    """
    index = index or index_path(tar)
    try:
        handle = os.open(tar, os.O_RDONLY)
        try:
            before = os.fstat(handle)
            samples = list(scan_tar(tar))
            digest = tar_digest(handle, before.st_size)
            content = samples_digest(handle, samples)
        finally:
            os.close(handle)
        after = tar.stat()
    except OSError as error:
        raise DataError(f"Tar {tar} cannot be read: {error}") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"Tar {tar} was written to while it was being indexed; wait until it is finished.")
    damage = next((sample for sample in samples if sample.damaged), None)
    if require_complete and damage is not None:
        raise DataError(f"{sample_location(tar, damage.key)}: {damage.error}")
    _write_samples(index, samples, before, digest, content)
    return len(samples)


def _write_samples(
    index: Path, samples: Iterable[TarSample], tar: os.stat_result, digest: bytes, content: bytes
) -> None:
    """Write an index of the samples of a tar, atomically. Raises DataError where its folder cannot be written."""
    records, strings = bytearray(), bytearray()
    num_samples = num_readable = is_damaged = 0
    for sample in samples:
        key, error = (_encode_string(text) for text in (sample.key, sample.error))
        string_offsets = len(strings), len(strings) + len(key)
        strings += key + error
        ranges = (sample.text, sample.image, sample.json)
        records += _RECORD.pack(
            *(data.offset for data in ranges), *(data.size for data in ranges),
            *string_offsets, len(key), len(error), sample.image_suffix.encode(), sample.damaged,
        )  # fmt: skip
        num_samples += 1
        num_readable += not sample.error
        is_damaged |= sample.damaged
    header = _HEADER.pack(
        _MAGIC, VERSION, _RECORD.size, tar.st_size, tar.st_mtime_ns, digest,
        num_samples, num_readable, len(strings), content, is_damaged,
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
    """Return 16 bytes that tell a tar from another of its size: of blocks spread evenly, first and last included."""
    digest = blake2b(digest_size=16)
    last = max(0, size - _DIGEST_BLOCK_BYTES)
    for number in range(_DIGEST_BLOCKS):
        digest.update(os.pread(handle, _DIGEST_BLOCK_BYTES, last * number // (_DIGEST_BLOCKS - 1)))
    return digest.digest()


def samples_digest(handle: int, samples: Iterable[TarSample]) -> bytes:
    """Return 16 bytes that tell the samples of an open tar from others: whole texts, sizes and both ends of the images.

    An image that is encoded anew almost never keeps its size and its last bytes. Names and times are left out: they
    change nothing that is trained.
    """
    digest = blake2b(digest_size=16)
    for sample in samples:
        if sample.error:
            digest.update(b"unreadable ")
            continue
        text, image = sample.text, sample.image
        edge = min(image.size, _IMAGE_EDGE_BYTES)
        digest.update(f"{text.size} {image.size} ".encode())
        digest.update(os.pread(handle, text.size, text.offset))
        digest.update(os.pread(handle, edge, image.offset))
        digest.update(os.pread(handle, edge, image.offset + image.size - edge))
    return digest.digest()


def samples_match(index: Path, tar: Path) -> bool:
    """Return whether the samples at an index's offsets in a tar have the content that was indexed."""
    try:
        opened = TarIndex(index)
        handle = os.open(tar, os.O_RDONLY)
    except (OSError, DataError):
        return False
    try:
        samples = (opened.sample(number) for number in range(opened.header.num_samples))
        return samples_digest(handle, samples) == opened.header.samples_digest
    except (OSError, DataError):
        return False
    finally:
        os.close(handle)


def read_header(index: Path) -> IndexHeader | None:
    """Read the header of an index; None where there is none, or it is malformed, cut off or of another version."""
    try:
        handle = os.open(index, os.O_RDONLY)
    except OSError:
        return None
    try:
        return _read_header(handle)
    except OSError:
        return None
    finally:
        os.close(handle)


def index_matches(header: IndexHeader, tar: Path, size: int, mtime_ns: int) -> bool:
    """Return whether an index is that of the tar, whose size and modification time (ns) are given."""
    if header.tar_bytes != size:
        return False
    if header.tar_mtime_ns == mtime_ns:
        return True
    try:
        handle = os.open(tar, os.O_RDONLY)
    except OSError:
        return False
    try:
        return tar_digest(handle, size) == header.digest
    finally:
        os.close(handle)


class TarIndex:
    """An open index: samples by number, two small reads each. Raises DataError where it is missing or malformed.

    Read with pread, not mapped: truncating a mapped file kills the process with a bus error.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
            header = _read_header(self._handle)
        except OSError as error:
            raise DataError(f"Index {path} cannot be read: {error}; start again and it is built anew.") from error
        if header is None:
            raise _malformed(path)
        self.header = header
        self._strings = _HEADER.size + header.num_samples * _RECORD.size

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def sample(self, number: int) -> TarSample:
        """Return sample ``number`` of the tar, from 0."""
        assert 0 <= number < self.header.num_samples, (number, self.header.num_samples)
        record = _RECORD.unpack(self._read(_RECORD.size, _HEADER.size + number * _RECORD.size))
        (text, image, json), sizes, (key, error, key_size, error_size, suffix, damaged) = (
            record[:3],
            record[3:6],
            record[6:],
        )
        return TarSample(
            self._read(key_size, self._strings + key).decode("utf-8", "replace"),
            ByteRange(text, sizes[0]),
            ByteRange(image, sizes[1]),
            ByteRange(json, sizes[2]),
            suffix.rstrip(b"\0").decode("ascii", "replace"),
            self._read(error_size, self._strings + error).decode("utf-8", "replace") if error_size else "",
            bool(damaged),
        )

    def errors(self) -> Iterator[TarSample]:
        """Yield the samples that cannot be read, and where the tar is damaged; the records are read in blocks."""
        for first in range(0, self.header.num_samples, _RECORDS_AT_ONCE):
            count = min(_RECORDS_AT_ONCE, self.header.num_samples - first)
            records = self._read(count * _RECORD.size, _HEADER.size + first * _RECORD.size)
            for number, record in enumerate(_RECORD.iter_unpack(records), start=first):
                if record[_ERROR_SIZE_FIELD]:
                    yield self.sample(number)

    def _read(self, size: int, offset: int) -> bytes:
        try:
            data = os.pread(self._handle, size, offset)
        except OSError as error:
            raise DataError(f"Index {self.path} cannot be read: {error}") from error
        if len(data) != size:
            raise _malformed(self.path)
        return data


def _read_header(handle: int) -> IndexHeader | None:
    data = os.pread(handle, _HEADER.size, 0)
    if len(data) < _HEADER.size:
        return None
    magic, version, record_bytes, *fields = _HEADER.unpack(data)
    header = IndexHeader(*fields)
    if (magic, version, record_bytes) != (_MAGIC, VERSION, _RECORD.size):
        return None
    index_bytes = _HEADER.size + header.num_samples * _RECORD.size + header.strings_bytes
    return header if os.fstat(handle).st_size == index_bytes else None


def _encode_string(text: str) -> bytes:
    """Encode as UTF-8, cut between characters at 64 KiB."""
    return text.encode("utf-8", "backslashreplace")[:_MAX_STRING_BYTES].decode("utf-8", "ignore").encode()


def _malformed(index: Path) -> DataError:
    return DataError(f"Index {index} is missing, malformed or cut off; delete it and start again, it is built anew.")
