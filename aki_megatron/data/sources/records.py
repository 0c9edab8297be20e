"""What the readers share: the reader interface, compact records, errors that name the record, file names."""

import io
import marshal
import math
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.errors import DataError
from aki_megatron.types import BYTE_ORDER_MARK, Conversation

MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError, RecursionError)
"""What parsing a record raises where a field is missing, of a wrong type or of a value that makes no sense."""

MAX_SHOWN = 100
"""Characters of a foreign value that a message shows."""

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
    find_files       (data root, split) -> the files and folders of a root that may have another layout than ``files``
    """

    files: Mapping[str, tuple[str, ...]]
    read: "Callable[[Path, str], LazyConversations[Any]]"
    read_multi_turn: "Callable[[Path, str], LazyConversations[Any]] | None" = None
    find_files: Callable[[Path, str], tuple[str, ...]] | None = None

    def files_below(self, root: Path, split: str) -> tuple[str, ...]:
        """Return the annotation files and image folders of a split in this data root, whether they exist or not."""
        return self.find_files(root, split) if self.find_files else self.files[split]


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
    """Compact records in memory; a Conversation is built on access. Building may raise DataError.

    faults  the records of the annotation files that are left out
    """

    def __init__(
        self, records: Sequence[Record], build: Callable[[Record], Conversation], faults: FaultCounts | None = None
    ) -> None:
        self._records = records
        self._build = build
        self.faults = faults or FaultCounts()

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
    faults: FaultCounts,
    *,
    id_field: str = "",
) -> Iterator[Record]:
    """Yield the records that ``parse`` makes of each entry of a file.

    An entry with a missing field, a wrong type or a ValueError is left out and counted in ``faults``, whose messages
    name the file, the location of the entry and, where the entry has one, its id. Raises DataError for what cannot be
    read on from, as a file that is no JSON.
    """
    location: Location | None = None
    entry: Any = None
    with data_errors(lambda: describe_entry(file, location, entry, id_field)):
        for location, entry in entries:
            try:
                yield from parse(location, entry)
            except MALFORMED as error:
                reason = error_reason(error)
                if isinstance(error, TypeError | AttributeError) and not isinstance(entry, Mapping | bytes):
                    reason = f"an entry must be an object, got {repr(entry)[:MAX_SHOWN]}"
                faults.add(describe_entry(file, location, entry, id_field), reason)


def describe_entry(file: Path, location: object, entry: object, id_field: str = "") -> str:
    """Return the file, the location of an entry in it and, where the entry has one, its id."""
    has_id = isinstance(entry, Mapping) and id_field in entry
    return f"{file}, {location}" + (f" ({id_field} {str(entry[id_field])[:MAX_SHOWN]})" if has_id else "")  # type: ignore[index]


def error_reason(error: Exception) -> str:
    """Return in words what an error of MALFORMED says about a record."""
    if isinstance(error, KeyError):
        return f"the field {error} is missing"
    if isinstance(error, TypeError | AttributeError):  # raised by what was done with the value
        return f"a value is of a wrong type ({error})"
    return str(error) or type(error).__name__


@contextmanager
def data_errors(where: str | Callable[[], str]) -> Iterator[None]:
    """Turn a missing field or a wrong type into a DataError that says where it was."""
    try:
        yield
    except MALFORMED as error:
        location = where if isinstance(where, str) else where()
        raise DataError(f"{location}: {error_reason(error)}") from error


def text_field(entry: Mapping[str, Any], field: str) -> str:
    """Return a field that holds text; a number becomes its digits, anything else (null, a list) raises ValueError.

    So do infinity and NaN, and a lone surrogate (an escape that was cut in two): no tokenizer takes it. A byte-order
    mark at the beginning is left out.
    """
    return as_text(entry[field], field)


def as_text(value: object, field: str) -> str:
    """Return ``value`` as ``text_field`` does."""
    if isinstance(value, str):
        if value.isascii():
            return value
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{field} holds half of a surrogate pair ({ascii(value[error.start])}) in {ascii(value)[:MAX_SHOWN]}"
            ) from error
        return value.removeprefix(BYTE_ORDER_MARK)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise ValueError(f"{field} must be text, got {repr(value)[:MAX_SHOWN]}")


def as_int(value: object, field: str) -> int:
    """Return a whole number, which may be written as text; anything else (a fraction, null) raises ValueError."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.isascii() and value.strip().removeprefix("-").isdigit():
        return int(value)
    raise ValueError(f"{field} must be a whole number, got {repr(value)[:MAX_SHOWN]}")


def as_list(value: object, field: str) -> list[Any]:
    """Return a list; anything else (text, whose characters would be its elements) raises ValueError."""
    if isinstance(value, list):
        return value
    raise ValueError(f"{field} must be a list, got {repr(value)[:MAX_SHOWN]}")


def safe_path(root: Path, name: str, *, key: str) -> Path:
    """Return ``root / name``. Raises DataError if a name from an annotation file is absolute or leads out of root."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise DataError(f"Sample {key}: the file name {name!r} leads out of the data root {root}.")
    return root / name
