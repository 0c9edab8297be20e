"""Records of users' own conversations in JSON and JSONL files, by number.

A JSONL file is read once from end to end when it is opened, which finds every bad record; only where each good line
begins stays in memory, and a line is read again when it is asked for. A JSON file holds one array, and its records stay
in memory in compact form.
"""

import json
import operator
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.chat_record import ChatRecord, ChatTurn, RecordLayout, image_content, parse_record
from aki_megatron.data.sources.json_stream import JsonLocation, iter_array
from aki_megatron.data.sources.records import (
    MALFORMED,
    PackedRecords,
    describe_entry,
    error_reason,
    parse_entries,
)
from aki_megatron.errors import DataError
from aki_megatron.types import BYTE_ORDER_MARK

_BOM = BYTE_ORDER_MARK.encode()


class FileRecord(NamedTuple):
    """A record and where it is: ``number`` of its line, entry or row, and the same in words."""

    file: Path
    number: int
    location: str
    chat: ChatRecord


class ChatRecords(Sequence[FileRecord]):
    """Records by number; ``read`` is what a kind of file implements. Reading one may raise DataError."""

    def __init__(self, length: int) -> None:
        self._length = length

    def read(self, index: int) -> FileRecord:
        """Return a record; ``index`` is not negative and below the length."""
        raise AssertionError(index)

    def read_text(self, index: int) -> FileRecord:
        """Return a record whose images may be empty, where that costs less."""
        return self.read(index)

    def locate(self, index: int) -> str:
        """Return the file and the line, entry or row of a record."""
        record = self.read(index)
        return f"{record.file}, {record.location}"

    def turn_counts(self) -> list[int]:
        """Return the number of answers of every record."""
        return [len(self.read(index).chat.turns) for index in range(len(self))]

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of records of each part of the file that is read as a whole."""
        return np.ones(len(self), dtype=np.int64)

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> FileRecord: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[FileRecord]: ...

    def __getitem__(self, index: int | slice) -> FileRecord | Sequence[FileRecord]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(index)
        return self.read(number % len(self))


def is_json_array(file: Path) -> bool:
    """Return whether a file holds one JSON array, by its first character; one that is called .jsonl never does.

    Raises DataError where it cannot be read.
    """
    if file.suffix.lower() == ".jsonl":
        return False
    try:
        with file.open("rb") as opened:
            while head := opened.read(4096):
                if head := head.removeprefix(_BOM).lstrip():
                    return head.startswith(b"[")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return False


class JsonArrayRecords(ChatRecords):
    """The elements of a JSON array, in memory."""

    def __init__(self, file: Path, layout: RecordLayout, roots: Sequence[Path], faults: FaultCounts) -> None:
        self._file = file
        self.keys: set[str] = set()
        entries = parse_entries(file, self._note_keys(file), _Parser(layout, roots), faults, id_field=layout.id[0])
        self._records = PackedRecords(entries, _unpack)
        super().__init__(len(self._records))

    def _note_keys(self, file: Path) -> Iterator[tuple[JsonLocation, Any]]:
        for location, entry in iter_array(file):
            self.keys.update(entry if isinstance(entry, Mapping) else ())
            yield location, entry

    def read(self, index: int) -> FileRecord:
        number, chat = self._records[index]
        return FileRecord(self._file, number, f"entry {number}", chat)


class JsonLinesRecords(ChatRecords):
    """The lines of a JSONL file, by their offsets. The file is opened for every line, so none stays open."""

    def __init__(self, file: Path, layout: RecordLayout, roots: Sequence[Path], faults: FaultCounts) -> None:
        self._file, self._layout = file, layout
        self.keys: set[str] = set()
        starts, numbers, turns = array("Q"), array("Q"), array("Q")
        parser = _Parser(layout, roots)
        for number, start, line in _lines(file):
            entry: Any = None
            try:
                entry = _parse_line(line)
                self.keys.update(entry if isinstance(entry, Mapping) else ())
                for values in parser(JsonLocation("", number), entry):
                    starts.append(start)
                    numbers.append(number)
                    turns.append(len(values[3]))
            except MALFORMED as error:
                faults.add(describe_entry(file, f"line {number}", entry, layout.id[0]), error_reason(error))
        self._starts, self._numbers = np.array(starts, dtype=np.uint64), np.array(numbers, dtype=np.uint64)
        self._turns = np.array(turns, dtype=np.uint32)
        super().__init__(len(self._starts))

    def read(self, index: int) -> FileRecord:
        number = int(self._numbers[index])
        location = f"line {number}"
        try:
            with self._file.open("rb") as file:
                file.seek(int(self._starts[index]))
                line = file.readline()
            chat = parse_record(_parse_line(line), self._layout)
        except OSError as error:
            raise DataError(f"{self._file} cannot be read: {error}") from error
        except MALFORMED as error:  # it was good when the file was opened
            raise DataError(
                f"{self._file}, {location} has changed while the run reads it: {error_reason(error)}"
            ) from error
        return FileRecord(self._file, number, location, chat)

    def locate(self, index: int) -> str:
        return f"{self._file}, line {self._numbers[index]}"

    def turn_counts(self) -> list[int]:
        return [int(count) for count in self._turns]


class _Parser:
    """Make the compact record of an entry, with its images checked."""

    def __init__(self, layout: RecordLayout, roots: Sequence[Path]) -> None:
        self._layout, self._roots = layout, roots

    def __call__(self, location: JsonLocation, entry: Any) -> Iterator[tuple[Any, ...]]:
        chat = parse_record(entry, self._layout)
        for image in chat.images:
            image_content(image, self._roots)
        turns = [tuple(turn) for turn in chat.turns]
        yield location.number, chat.name, chat.system_message, turns, chat.images


def _unpack(values: tuple[Any, ...]) -> tuple[int, ChatRecord]:
    number, name, system_message, turns, images = values
    return number, ChatRecord(name, system_message, tuple(ChatTurn._make(turn) for turn in turns), images)


def _lines(file: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield number (from 1), offset and bytes of every line that is not blank. Only newlines end lines."""
    try:
        with file.open("rb") as opened:
            start = 0
            for number, line in enumerate(opened, start=1):
                if line.removeprefix(_BOM).strip():
                    yield number, start, line
                start += len(line)
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line.removeprefix(_BOM).strip())
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error.msg} (character {error.pos})") from error
