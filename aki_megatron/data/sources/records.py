"""What the readers share: the reader interface, compact records, errors that name the record, file names."""

import io
import marshal
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from aki_megatron.errors import DataError
from aki_megatron.types import Conversation

Record = TypeVar("Record")
Location = TypeVar("Location")
Id = TypeVar("Id")


@dataclass(frozen=True)
class DatasetReader:
    """How one dataset is read from its original annotation files and folder layout.

    files            split ("train" or "val") -> annotation files and image folders under the data root; a split that
                     the release does not have is absent
    read             (data root, split) -> samples
    read_multi_turn  the same for a dataset of conversations, each kept as one sample of several turns
    """

    files: Mapping[str, tuple[str, ...]]
    read: Callable[[Path, str], Sequence[Conversation]]
    read_multi_turn: Callable[[Path, str], Sequence[Conversation]] | None = None


class PackedRecords(Sequence[Record], Generic[Record]):
    """Records in one blob of bytes, and where each starts: millions of records are two objects, not millions.

    Worker processes that are forked share the two without ever writing to them (no reference counts inside).
    A record holds text, numbers and lists of them; ``make`` turns the stored tuple into a record: a NamedTuple's
    ``_make``. The blob lives in memory only; marshal is five times as fast as JSON in both directions.
    """

    def __init__(self, records: Iterable[Iterable[Any]], make: Callable[[tuple[Any, ...]], Record]) -> None:
        blob, starts = io.BytesIO(), array("Q", [0])
        write, end = blob.write, 0
        for record in records:
            end += write(marshal.dumps(tuple(record)))
            starts.append(end)
        self._blob = blob.getvalue()
        self._starts = np.array(starts, dtype=np.uint64)
        self._make = make

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | Sequence[Record]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = operator.index(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(index)
        start, end = self._starts[number : number + 2].tolist()
        return self._make(marshal.loads(self._blob[start:end]))


class LazyConversations(Sequence[Conversation], Generic[Record]):
    """Compact records in memory; a Conversation is built on access. Building may raise DataError."""

    def __init__(self, records: Sequence[Record], build: Callable[[Record], Conversation]) -> None:
        self._records = records
        self._build = build

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return LazyConversations(self._records[index], self._build)
        return self._build(self._records[index])


def parse_entries(
    file: Path,
    entries: Iterable[tuple[Location, Any]],
    parse: Callable[[Location, Any], Iterable[Record]],
    *,
    id_field: str = "",
) -> Iterator[Record]:
    """Yield the records that ``parse`` makes of each entry of a file.

    A missing field, a wrong type or a ValueError becomes a DataError that names the file, the location of the entry
    and, where the entry has one, its id.
    """
    location: Location | None = None
    entry: Any = None

    def where() -> str:
        has_id = isinstance(entry, Mapping) and id_field in entry
        return f"{file}, {location}" + (f" ({id_field} {entry[id_field]})" if has_id else "")

    with data_errors(where):
        for location, entry in entries:
            yield from parse(location, entry)


def unique_by_id(file: Path, pairs: Iterable[tuple[Id, Record]], id_field: str) -> dict[Id, Record]:
    """Return the records of a file by id. Raises DataError where one id has several different records."""
    found: dict[Id, Record] = {}
    repeated: list[Id] = []
    for record_id, record in pairs:
        if found.setdefault(record_id, record) != record:
            repeated.append(record_id)
    check_no_id_twice(file, repeated, id_field)
    return found


def check_no_id_twice(file: Path, repeated: Sequence[object], id_field: str) -> None:
    """Raise DataError if there are ids that occur more than once."""
    if repeated:
        raise DataError(
            f"{file}: {len(repeated)} entries have an id that another entry has too ({id_field} "
            f"{list(dict.fromkeys(repeated))[:3]}), so which one is meant is not known; remove all but one of each id."
        )


@contextmanager
def data_errors(where: str | Callable[[], str]) -> Iterator[None]:
    """Turn a missing field or a wrong type into a DataError that says where it was."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        location = where if isinstance(where, str) else where()
        reason = f"the field {error} is missing." if isinstance(error, KeyError) else str(error)
        raise DataError(f"{location}: {reason}") from error


def text_field(entry: Mapping[str, Any], field: str) -> str:
    """Return a field that holds text; a number becomes its digits, anything else (null, a list) raises ValueError.

    So does a lone surrogate (an escape that was cut in two): no tokenizer takes it.
    """
    return as_text(entry[field], field)


def as_text(value: object, field: str) -> str:
    """Return ``value`` as ``text_field`` does."""
    if isinstance(value, str):
        if not value.isascii():
            value.encode()  # UnicodeEncodeError is a ValueError
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{field} must be text, got {value!r}")


def safe_path(root: Path, name: str, *, key: str) -> Path:
    """Return ``root / name``. Raises DataError if a name from an annotation file is absolute or leads out of root."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise DataError(f"Sample {key}: the file name {name!r} leads out of the data root {root}.")
    return root / name
