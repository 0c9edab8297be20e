"""JSON files read entry by entry: an annotation file of a gigabyte never stands in memory as Python objects.

Readers yield (Place, value) and raise DataError, which names the file and the character, for anything that is not
valid JSON or not of the expected outline.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from aki_megatron.errors import DataError

CHUNK = 2**20
"""Characters read at a time; a value that does not fit doubles it."""

_DECODER = json.JSONDecoder()
_AFTER = frozenset(" \t\r\n,:]}")
_SPACES = re.compile(r"[ \t\r\n]*")


class Place(NamedTuple):
    """Where a value stands in its file: ``entry 3``, ``images[3]``, or the name of an entry."""

    name: str
    number: int = -1

    def __str__(self) -> str:
        if self.number < 0:
            return f"entry {self.name!r}"
        return f"{self.name}[{self.number}]" if self.name else f"entry {self.number}"


def array(path: Path) -> Iterator[tuple[Place, Any]]:
    """The elements of a file that holds one array."""
    with _opened(path) as reader:
        for index, element in enumerate(reader.elements()):
            yield Place("", index), element
        reader.finish()


def members(path: Path) -> Iterator[tuple[Place, Any]]:
    """The entries of a file that holds one object, by name."""
    with _opened(path) as reader:
        for name in reader.names():
            yield Place(name), reader.value()
        reader.finish()


def arrays(path: Path, *wanted: str) -> Iterator[tuple[Place, Any]]:
    """The elements of the ``wanted`` arrays of a file that holds one object; its other entries as they are.

    Raises DataError at the end of the file for an array that was not there.
    """
    found: set[str] = set()
    with _opened(path) as reader:
        for name in reader.names():
            found.add(name)
            if name in wanted:
                for index, element in enumerate(reader.elements()):
                    yield Place(name, index), element
            else:
                yield Place(name), reader.value()
        reader.finish()
    absent = [name for name in wanted if name not in found]
    if absent:
        raise DataError(f"{path}: the field {', '.join(map(repr, absent))} is missing; it holds {sorted(found)}.")


@contextmanager
def _opened(path: Path) -> Iterator["_Reader"]:
    """A reader of the file; whatever goes wrong in it names the file."""
    try:
        # utf-8-sig: a byte-order mark is no part of the text; newline="": JSON has no raw newlines worth translating
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield _Reader(path, file)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


class _Reader:
    """A window on the text that moves forward; ``_at`` is the next character in it, ``_before`` were dropped."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._file = file
        self._text = ""
        self._at = 0
        self._before = 0

    def elements(self) -> Iterator[Any]:
        """The elements of the array that starts here."""
        self._expect("[")
        if self._took("]"):
            return
        yield self.value()
        while not self._took("]"):
            self._expect(",")
            yield self.value()

    def names(self) -> Iterator[str]:
        """The names of the object that starts here; the caller reads the value after each name."""
        self._expect("{")
        if self._took("}"):
            return
        yield self._name()
        while not self._took("}"):
            self._expect(",")
            yield self._name()

    def value(self) -> Any:
        """The value that starts here."""
        self._peek()
        while True:
            start = self._at
            try:
                value, end = _DECODER.raw_decode(self._text, start)
            except json.JSONDecodeError as error:
                fault = self._invalid(error.msg, error.pos)
                if not self._more():  # it may only have been cut off by the window
                    raise fault from error
            else:
                # before the window's end a number may go on: "0" of "0." and that of "0.5"
                if self._text[end : end + 1] in _AFTER or not self._more():
                    self._at += end - start
                    return value

    def finish(self) -> None:
        """Nothing but spaces may follow."""
        if self._peek():
            raise self._invalid("Extra data", self._at)

    def _name(self) -> str:
        if self._peek() != '"':
            raise self._invalid("Expecting property name enclosed in double quotes", self._at)
        name: str = self.value()
        self._expect(":")
        return name

    def _peek(self) -> str:
        """The next character that is no space; empty at the end of the file."""
        while True:
            found = _SPACES.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _took(self, character: str) -> bool:
        if self._peek() != character:
            return False
        self._at += 1
        return True

    def _expect(self, character: str) -> None:
        if not self._took(character):
            got = repr(self._text[self._at]) if self._at < len(self._text) else "the end of the file"
            raise self._invalid(f"Expecting {character!r}, got {got}", self._at)

    def _more(self) -> bool:
        """Drop what was read and read on; False at the end of the file."""
        rest = self._text[self._at :]
        self._before += self._at
        read = self._file.read(max(CHUNK, len(rest)))
        self._text, self._at = rest + read, 0
        return bool(read)

    def _invalid(self, reason: str, at: int) -> DataError:
        return DataError(f"{self._path} is not valid JSON: {reason} (character {self._before + at}).")
