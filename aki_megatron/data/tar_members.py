"""Find the members of a tar by reading its headers alone; damage is a member with an error, never an exception.

tarfile of the standard library is not exact enough for this: it takes a damaged header or zeros in the middle of a
tar, and a cut between two members, for the end of the tar and reports nothing. It is also three times slower.
Understood here: POSIX ustar and pax (path, size), GNU long names and sizes above 8 GiB. Links and sparse files are
members that cannot be used. What lies behind damage is found again by the next valid header, so that it is counted.
"""

import os
from collections.abc import Generator, Iterator
from typing import NamedTuple

MAX_MEMBER_BYTES = 2**28
"""A larger text or image is refused as damage or malice; reading it would fill the memory of every worker."""

LINK = "is a link to another member, and links are not followed; pack the files again with tar --hard-dereference"
SPARSE = "is stored as a sparse file, which is not read; pack the files again without tar --sparse"

OTHER_KIND = "is a device, a pipe or a folder, not a file"

_BLOCK, _CHUNK = 512, 2**20
_ZEROS = bytes(_BLOCK)
_FILE = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_NO_FILES = (b"3", b"4", b"5", b"6")
_EXTENDED = (b"x", b"g", b"L", b"K")
# links, devices, folders: a size in their header does not count bytes that follow
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_MAGIC, _MAGIC_OFFSET = b"ustar", 257
_MAX_DIGITS = 20


class ByteRange(NamedTuple):
    """Where a member's bytes are in its tar."""

    offset: int
    size: int


EMPTY_RANGE = ByteRange(0, 0)


class Member(NamedTuple):
    """One member: its name and bytes; or ``problem``: why it cannot be used, as a predicate ("is a link ...").

    damage  this is no member but the point where the tar is cut off or malformed, after the member of this name;
            ``problem`` is then a sentence
    lost    it lies behind such a point; webdataset, too, reads nothing from there on
    """

    name: str
    data: ByteRange = EMPTY_RANGE
    problem: str = ""
    damage: bool = False
    lost: bool = False


class _Damage(NamedTuple):
    name: str
    problem: str
    resume: int
    """Where to look for the next header."""


def iter_members(handle: int, size: int) -> Iterator[Member]:
    """Yield every file of an open tar of ``size`` bytes, and at the first damage one Member with ``damage``."""
    offset: int | None = 0
    lost = False
    while offset is not None:
        damage = yield from _members_from(handle, size, offset, lost)
        if damage is None:
            return
        if not lost:
            yield Member(damage.name, problem=damage.problem, damage=True)
        offset, lost = find_header(handle, damage.resume), True


def _members_from(handle: int, size: int, offset: int, lost: bool) -> Generator[Member, None, _Damage | None]:
    """Yield the members from a header on; return the damage that ended them, None at a valid end."""
    name = ""
    extended: dict[str, str] = {}  # what a pax or long-name member says about the next one
    while True:
        block = os.pread(handle, _BLOCK, offset)
        if block == _ZEROS or len(block) < _BLOCK:
            problem = _end_problem(handle, offset)
            return _Damage(name, problem, offset) if problem else None
        header = parse_header(block)
        if header is None:
            where = "after this key" if name else "at its beginning"
            return _Damage(name, f"the tar is malformed {where}: no valid header at byte {offset}.", offset)
        kind, data_size, start = header.kind, int(extended.get("size", header.size)), offset + _BLOCK
        if kind in _EXTENDED:
            data_size = header.size  # a pax size is that of the member after it
        else:
            name = extended.get("path", header.name)
        if kind == b"S":
            start = _sparse_start(handle, block, start)
        end = start + (data_size if kind not in _WITHOUT_DATA else 0)
        if end > size:
            problem = f"the tar is cut off inside {printable(name)} ({end} bytes needed, {size} there)."
            return _Damage(name, problem, offset + _BLOCK)
        if kind in _EXTENDED:
            extended |= _parse_extended(kind, os.pread(handle, min(data_size, MAX_MEMBER_BYTES), start))
        else:
            problem = LINK if kind in _LINKS else SPARSE if kind == b"S" or "sparse" in extended else ""
            problem = OTHER_KIND if kind in _NO_FILES else problem
            if (kind in _FILE or problem) and not name.endswith("/"):
                yield Member(name, ByteRange(start, data_size), problem, lost=lost)
            extended = {}
        offset = start + -(-(end - start) // _BLOCK) * _BLOCK


def find_header(handle: int, offset: int) -> int | None:
    """Return where the first valid ustar, pax or GNU header at or after ``offset`` begins, on any byte."""
    position = offset
    while chunk := os.pread(handle, _CHUNK + _BLOCK, position):
        found = chunk.find(_MAGIC)
        while found >= 0:
            start = position + found - _MAGIC_OFFSET
            block = os.pread(handle, _BLOCK, start) if start >= offset else b""
            if len(block) == _BLOCK and parse_header(block) is not None:
                return start
            found = chunk.find(_MAGIC, found + 1)
        position += _CHUNK
    return None


class Header(NamedTuple):
    """What is used of a header."""

    kind: bytes
    name: str
    size: int


def parse_header(block: bytes) -> Header | None:
    """Parse a header of 512 bytes; None where its checksum or a number is wrong."""
    checksum = _parse_number(block[148:156])
    # the checksum counts its own field as blanks
    if checksum != sum(block) - sum(block[148:156]) + 8 * 32:
        return None
    size = _parse_number(block[124:136])
    if size is None:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return Header(block[156:157], name.decode("utf-8", "surrogateescape"), size)


def printable(name: str) -> str:
    """Escape the bytes of a name that are not UTF-8 (surrogates, as in tarfile), so that every key can be encoded."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _parse_number(field: bytes) -> int | None:
    """Parse a number of a header: octal digits, or GNU's binary form with the top bit set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        value = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None
    return value if value >= 0 else None


def _parse_extended(kind: bytes, data: bytes) -> dict[str, str]:
    """Return what an extended header says of the next member: "path", "size"; "sparse" if it is not in one piece."""
    if kind == b"L":
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    while kind == b"x" and data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or len(length) > _MAX_DIGITS or not 0 < int(length) <= len(data):
            break
        name, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if name == b"size" and value.isdigit() and len(value) <= _MAX_DIGITS:
            found["size"] = value.decode()
        elif name == b"GNU.sparse.name" or (name == b"path" and "sparse" not in found):
            found["path"] = value.decode("utf-8", "surrogateescape")  # a sparse file's "path" is one of tar's making
        if name.startswith(b"GNU.sparse"):
            found["sparse"] = ""
        data = data[int(length) :]
    return found


def _sparse_start(handle: int, header: bytes, start: int) -> int:
    """Return where the data of a GNU sparse file begins: after the blocks that continue its header, if any."""
    continued = header[482]
    while continued:
        block = os.pread(handle, _BLOCK, start)
        start += _BLOCK
        continued = block[504] if len(block) == _BLOCK else 0
    return start


def _end_problem(handle: int, offset: int) -> str:
    """Return why the end of the tar at ``offset`` is not valid (two blocks of zeros, then zeros); empty if it is."""
    if len(os.pread(handle, 2 * _BLOCK, offset)) < 2 * _BLOCK:
        return "the tar has no end mark; it was cut off after this key."
    end = offset
    while rest := os.pread(handle, _CHUNK, end):
        if rest.count(0) < len(rest):
            if find_header(handle, offset) is None:
                return f"the tar is malformed after this key: zeros at byte {offset}, and more data after them."
            return (
                f"the tar ends after this key (zeros at byte {offset}) but more members follow: zeros in its middle, "
                "or tars joined by cat; join them with tar --concatenate."
            )
        end += len(rest)
    return ""
