"""What a tar holds: samples as runs of members, found by reading the headers alone.

A sample is a run of members that share a name up to the first dot of its last part: ``000012.jpg`` (or png, jpeg),
``000012.txt`` and, optionally, ``000012.json``. Damage becomes an entry with a reason, never an exception.

The headers are read here rather than by tarfile, which takes a damaged header in the middle for the end of the tar and
is several times slower. Understood: POSIX ustar and pax (path, size), GNU long names and sizes above 8 GiB.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = ("jpg", "png", "jpeg")
TEXT_SUFFIX = "txt"
JSON_SUFFIX = "json"

LARGEST_MEMBER_BYTES = 2**28
"""A text or picture above this is taken for damage or malice; reading it would fill the memory of every worker."""

_BLOCK, _CHUNK = 512, 2**20
_ZEROS = bytes(_BLOCK)
_FILE = (b"0", b"\0", b"7")
_SPECIAL = (b"x", b"g", b"L", b"K")
# links, devices, folders: a size there is not one of bytes that follow
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


class Extent(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


NOTHING = Extent(0, 0)


class Entry(NamedTuple):
    """One sample: key, its members (json may be empty), the picture's suffix; or ``fault``: why it cannot be read.

    ``torn`` marks the place where the tar is cut off or malformed; nothing after it can be found.
    """

    key: str
    text: Extent = NOTHING
    image: Extent = NOTHING
    json: Extent = NOTHING
    suffix: str = ""
    fault: str = ""
    torn: bool = False


def scan(tar: Path) -> Iterator[Entry]:
    """The samples of a tar in their order. Raises OSError where the file cannot be read."""
    handle = os.open(tar, os.O_RDONLY)
    try:
        key, members = "", dict[str, Extent]()
        for name, extent, fault in _members(handle, os.fstat(handle).st_size):
            if fault:
                yield from _complete(key, members)
                yield Entry(_printable(_key(name)[0]), fault=fault, torn=True)
                return
            new, suffix = _key(name)
            if not new:
                continue
            if new != key:
                yield from _complete(key, members)
                key, members = new, {}
            members[suffix] = extent
        yield from _complete(key, members)
    finally:
        os.close(handle)


def _key(name: str) -> tuple[str, str]:
    """(key, suffix) of a member; an empty key for what belongs to no sample (as in webdataset: .DS_Store, README)."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or (stem.startswith("__") and base.endswith("__")):
        return "", ""
    return f"{folder}{slash}{stem}", suffix.lower()


def _members(handle: int, size: int) -> Iterator[tuple[str, Extent, str]]:
    """(name, extent, "") for every file of a tar; where it is cut off or malformed, one last (name, -, fault)."""
    name, offset = "", 0
    extra: dict[str, str] = {}  # what a pax or long-name member says about the next one
    while True:
        block = os.pread(handle, _BLOCK, offset)
        if block == _ZEROS or len(block) < _BLOCK:
            if fault := _end_fault(handle, offset):
                yield name, NOTHING, fault
            return
        header = _header(block)
        if header is None:
            yield name, NOTHING, f"the tar is malformed after this key: no valid header at byte {offset}."
            return
        kind, stored = header.kind, int(extra.get("size", header.size))
        data = offset + _BLOCK
        if kind in _SPECIAL:
            stored = header.size  # a pax size speaks of the member after it
        else:
            name = extra.get("path", header.name)
        end = data + (stored if kind not in _WITHOUT_DATA else 0)
        if end > size:
            yield name, NOTHING, f"the tar is cut off inside {_printable(name)} ({end} bytes needed, {size} there)."
            return
        if kind in _SPECIAL:
            extra |= _special(kind, os.pread(handle, min(stored, LARGEST_MEMBER_BYTES), data))
        else:
            if kind in _FILE and not name.endswith("/") and "sparse" not in extra:
                yield name, Extent(data, stored), ""
            extra = {}
        offset = data + -(-(end - data) // _BLOCK) * _BLOCK


class _Header(NamedTuple):
    kind: bytes
    name: str
    size: int


def _header(block: bytes) -> _Header | None:
    """One header of 512 bytes; None where its checksum or a number is wrong."""
    checksum = _number(block[148:156])
    # the checksum counts its own field as blanks
    if checksum != sum(block) - sum(block[148:156]) + 8 * 32:
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _Header(block[156:157], name.decode("utf-8", "surrogateescape"), size)


def _number(field: bytes) -> int | None:
    """A number as tar writes it: octal digits, or GNU's binary form with the top bit set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        value = int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        return None
    return value if value >= 0 else None


def _special(kind: bytes, data: bytes) -> dict[str, str]:
    """What a special member says about the next: "path", "size", or "sparse" where its bytes are not in one piece."""
    if kind == b"L":
        return {"path": data.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    while kind == b"x" and data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            break
        name, _, value = rest[: int(length) - len(length) - 2].partition(b"=")
        if name == b"path" or (name == b"size" and value.isdigit()):
            found[name.decode()] = value.decode("utf-8", "surrogateescape")
        elif name.startswith(b"GNU.sparse"):
            found["sparse"] = ""
        data = data[int(length) :]
    return found


def _end_fault(handle: int, offset: int) -> str:
    """Why the tar does not end at ``offset`` as a tar does (two blocks of zeros, then only zeros); empty if it does."""
    if len(os.pread(handle, 2 * _BLOCK, offset)) < 2 * _BLOCK:
        return "the tar has no end mark; it was cut off after this key."
    while rest := os.pread(handle, _CHUNK, offset):
        if rest.count(0) < len(rest):
            return f"the tar is malformed after this key: zeros at byte {offset}, and more data after them."
        offset += len(rest)
    return ""


def _complete(key: str, members: dict[str, Extent]) -> Iterator[Entry]:
    """The entry of a finished run of members, if there was one."""
    if not members:
        return
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if suffix in members), "")
    text, image = members.get(TEXT_SUFFIX), members.get(suffix)
    name = _printable(key)
    if key.startswith("/") or ".." in key.split("/"):
        yield Entry(name, fault="the name leads out of the tar; keys are relative and have no '..'.")
    elif image is None or text is None:
        lacking = " and ".join(what for what, there in (("txt", text), ("jpg, png or jpeg", image)) if there is None)
        yield Entry(name, fault=f"no {lacking} member (found: {_printable(', '.join(sorted(members)))}).")
    elif max(text.size, image.size) > LARGEST_MEMBER_BYTES:
        fault = f"a member of {max(text.size, image.size)} bytes; {LARGEST_MEMBER_BYTES} at most."
        yield Entry(name, fault=fault)
    else:
        json = members.get(JSON_SUFFIX, NOTHING)
        yield Entry(name, text, image, json if json.size <= LARGEST_MEMBER_BYTES else NOTHING, suffix)


def _printable(name: str) -> str:
    """Bytes of a name that are not UTF-8 (tarfile's surrogates) written out, so that every key can be encoded."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
