"""What the sources share: compact rows that become conversations on access, records with named faults, file names."""

import io
import marshal
import operator
from array import array as number_array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np

from aki_megatron.errors import DataError
from aki_megatron.types import Conversation

Row = TypeVar("Row")
Place = TypeVar("Place")


class PackedRows(Sequence[Row], Generic[Row]):
    """Rows in one blob of bytes, and where each starts: millions of rows are two objects, not millions.

    Worker processes that are forked share the two without ever writing to them (no reference counts inside).
    A row holds text, numbers and lists of them; ``make`` turns the tuple that comes back into a row: a NamedTuple's
    ``_make``. The blob lives in memory only; marshal is five times as fast as JSON at both ends.
    """

    def __init__(self, rows: Iterable[Iterable[Any]], make: Callable[[tuple[Any, ...]], Row]) -> None:
        blob, starts = io.BytesIO(), number_array("Q", [0])
        write, end = blob.write, 0
        for row in rows:
            end += write(marshal.dumps(tuple(row)))
            starts.append(end)
        self._blob = blob.getvalue()
        self._starts = np.array(starts, dtype=np.uint64)
        self._make = make

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return len(self._blob) + self._starts.nbytes

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = operator.index(index)
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(index)
        start, end = self._starts[number : number + 2].tolist()
        return self._make(marshal.loads(self._blob[start:end]))


class Rows(Sequence[Conversation], Generic[Row]):
    """Compact rows in memory; a Conversation is built when it is asked for. Building may raise DataError."""

    def __init__(self, rows: Sequence[Row], build: Callable[[Row], Conversation]) -> None:
        self._rows = rows
        self._build = build

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return Rows(self._rows[index], self._build)
        return self._build(self._rows[index])


def rows_of(
    file: Path,
    records: Iterable[tuple[Place, Any]],
    make: Callable[[Place, Any], Iterable[Row]],
    *,
    id_field: str = "",
) -> Iterator[Row]:
    """The rows that ``make`` gives for each record of a file.

    A missing field, a wrong type or a ValueError becomes a DataError that names the file, the place of the record
    and, where the record has one, its id.
    """
    place: Place | None = None
    record: Any = None

    def where() -> str:
        named = isinstance(record, Mapping) and id_field in record
        return f"{file}, {place}" + (f" ({id_field} {record[id_field]})" if named else "")

    with naming(where):
        for place, record in records:
            yield from make(place, record)


@contextmanager
def naming(where: str | Callable[[], str]) -> Iterator[None]:
    """Turn a missing field or a wrong type into a DataError that says where it was."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        place = where if isinstance(where, str) else where()
        reason = f"the field {error} is missing." if isinstance(error, KeyError) else str(error)
        raise DataError(f"{place}: {reason}") from error


def text_of(record: Mapping[str, Any], field: str) -> str:
    """A field that holds text; a number counts as its digits, anything else (null, a list) raises ValueError.

    So does half of a surrogate pair (a cut escape): no tokenizer takes it.
    """
    return as_text(record[field], field)


def as_text(value: object, field: str) -> str:
    """As ``text_of``, for a value in hand."""
    if isinstance(value, str):
        if not value.isascii():
            value.encode()  # UnicodeEncodeError is a ValueError
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{field} must be text, got {value!r}")


def inside(root: Path, name: str, *, key: str) -> Path:
    """``root / name``; DataError if the name from an annotation file is absolute or climbs out of the root."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise DataError(f"Sample {key}: the file name {name!r} leads out of the data root {root}.")
    return root / name
