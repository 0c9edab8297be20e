"""Read JSON files entry by entry: an annotation file of a gigabyte is never in memory as Python objects.

Readers yield (JsonLocation, value) and raise DataError, which names the file and the character, for anything that is
not valid JSON or not of the expected outline.

ijson 3.6 was compared and is not as exact: its C backend turns a lone surrogate (an escape that was cut in two) into
"?" without an error and refuses integers above 64 bits; both backends yield nothing, without an error, for a file of
another outline, refuse a byte-order mark, NaN and floats that overflow, name another character or none, and take
quadratic memory for deep nesting. On 28 MB of regions in Visual Genome's format this reader takes 0.21 s, ijson's C
backend 0.26 s, its Python backend 5.2 s.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from aki_megatron.data.file_kind import HEAD_BYTES, TEXT_IN_UTF_16, file_kind, is_known_kind
from aki_megatron.errors import DataError

CHUNK = 2**20
"""Characters read at a time; a value that does not fit doubles it."""

_DECODER = json.JSONDecoder()
# Python refuses to convert integers of thousands of digits; as infinity one is an error of its record alone
_HUGE_NUMBERS = json.JSONDecoder(parse_int=float)
_AFTER_VALUE = frozenset(" \t\r\n,:]}")
_SPACES = re.compile(r"[ \t\r\n]*")


class JsonLocation(NamedTuple):
    """Where a value is in its file: ``entry 3``, ``images[3]``, or the name of an entry."""

    name: str
    number: int = -1

    def __str__(self) -> str:
        if self.number < 0:
            return f"entry {self.name!r}"
        return f"{self.name}[{self.number}]" if self.name else f"entry {self.number}"


def iter_array(path: Path) -> Iterator[tuple[JsonLocation, Any]]:
    """Yield the elements of a file that holds one array."""
    with _open(path) as reader:
        for index, element in enumerate(reader.elements()):
            yield JsonLocation("", index), element
        reader.finish()


def iter_object(path: Path) -> Iterator[tuple[JsonLocation, Any]]:
    """Yield the entries of a file that holds one object, by name."""
    with _open(path) as reader:
        for name in reader.names():
            yield JsonLocation(name), reader.value()
        reader.finish()


def iter_object_arrays(path: Path, *arrays: str) -> Iterator[tuple[JsonLocation, Any]]:
    """Yield the elements of the named arrays of a file that holds one object; its other entries as they are.

    Raises DataError at the end of the file for an array that was not there.
    """
    found: set[str] = set()
    with _open(path) as reader:
        for name in reader.names():
            found.add(name)
            if name in arrays:
                for index, element in enumerate(reader.elements()):
                    yield JsonLocation(name, index), element
            else:
                yield JsonLocation(name), reader.value()
        reader.finish()
    absent = [name for name in arrays if name not in found]
    if absent:
        raise DataError(f"{path}: the field {', '.join(map(repr, absent))} is missing; it holds {sorted(found)}.")


@contextmanager
def _open(path: Path) -> Iterator["_Reader"]:
    """Open a reader of the file; errors inside the context name the file."""
    try:
        # utf-8-sig: a byte-order mark is no part of the text; newline="": JSON has no raw newlines worth translating
        refuse_foreign(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield _Reader(path, file)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not valid JSON: it is not UTF-8{_first_bad_byte(path)}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def refuse_foreign(path: Path) -> None:
    """Raise DataError for a file that is surely no JSON, and say what it is; OSError where it cannot be read."""
    with path.open("rb") as file:
        kind = file_kind(file.read(HEAD_BYTES))
    if is_known_kind(kind) or kind in ("zeros", TEXT_IN_UTF_16):
        raise DataError(f"{path} is not valid JSON but {kind}; put the file there as it was published, in UTF-8.")


def _first_bad_byte(path: Path) -> str:
    """Return where a file stops being UTF-8, in words."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f" (line {number}, byte {offset + error.start} of the file: 0x{line[error.start]:02x})"
            offset += len(line)
    return ""


class _Reader:
    """A window that moves forward over the text; ``_at`` is the next character in it, ``_dropped`` come before it."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._file = file
        self._text = ""
        self._at = 0
        self._dropped = self._dropped_lines = self._line_start = 0

    def elements(self) -> Iterator[Any]:
        """Yield the elements of the array that starts here."""
        self._expect("[")
        if self._skip("]"):
            return
        yield self.value()
        while not self._skip("]"):
            self._expect(",")
            yield self.value()

    def names(self) -> Iterator[str]:
        """Yield the names of the object that starts here; the caller reads the value after each name."""
        self._expect("{")
        if self._skip("}"):
            return
        yield self._name()
        while not self._skip("}"):
            self._expect(",")
            yield self._name()

    def value(self) -> Any:
        """Return the value that starts here."""
        self._next_character()
        while True:
            start = self._at
            try:
                value, end = _decode(self._text, start)
            except json.JSONDecodeError as error:
                invalid = self._invalid(error.msg, error.pos)
                if not self._read_more():  # the value may only be cut off by the window
                    raise invalid from error
            except RecursionError as error:
                raise self._invalid("a value is nested too deeply", start) from error
            else:
                # a number at the end of the window may go on: "0" of "0." and that of "0.5"
                if self._text[end : end + 1] in _AFTER_VALUE or not self._read_more():
                    self._at += end - start
                    return value

    def finish(self) -> None:
        """Raise DataError if anything but spaces follows."""
        if self._next_character():
            raise self._invalid("Extra data", self._at)

    def _name(self) -> str:
        if self._next_character() != '"':
            raise self._invalid("Expecting property name enclosed in double quotes", self._at)
        name: str = self.value()
        self._expect(":")
        return name

    def _next_character(self) -> str:
        """Return the next character that is no space; empty at the end of the file."""
        while True:
            found = _SPACES.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_more():
                return ""

    def _skip(self, character: str) -> bool:
        if self._next_character() != character:
            return False
        self._at += 1
        return True

    def _expect(self, character: str) -> None:
        if not self._skip(character):
            got = repr(self._text[self._at]) if self._at < len(self._text) else "the end of the file"
            raise self._invalid(f"Expecting {character!r}, got {got}", self._at)

    def _read_more(self) -> bool:
        """Drop what was parsed and read on; return False at the end of the file."""
        rest = self._text[self._at :]
        if num_lines := self._text.count("\n", 0, self._at):
            self._dropped_lines += num_lines
            self._line_start = self._dropped + self._text.rindex("\n", 0, self._at) + 1
        self._dropped += self._at
        read = self._file.read(max(CHUNK, len(rest)))
        self._text, self._at = rest + read, 0
        return bool(read)

    def _invalid(self, reason: str, at: int) -> DataError:
        line, start = self._dropped_lines + 1, self._line_start
        if num_lines := self._text.count("\n", 0, at):
            line, start = line + num_lines, self._dropped + self._text.rindex("\n", 0, at) + 1
        character = self._dropped + at
        return DataError(
            f"{self._path} is not valid JSON: {reason} (line {line}, column {character - start + 1}, character "
            f"{character}). Repair it there, or fetch the file again."
        )


def _decode(text: str, start: int) -> tuple[Any, int]:
    """Return the value that starts at a character, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError:
        raise
    except ValueError:
        return _HUGE_NUMBERS.raw_decode(text, start)
