"""What the sources share: rows that become conversations on access, JSON, file names that stay inside the root."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

from aki_megatron.flow import Conversation, DataError

Row = TypeVar("Row")


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


def read_json(path: Path) -> Any:
    """The content of a JSON file; DataError names the file and the place of a syntax error."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from error


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Turn a missing field or a wrong type into a DataError that says where it was."""
    try:
        yield
    except KeyError as error:
        raise DataError(f"{where}: the field {error} is missing.") from error
    except (TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"{where}: {error}") from error


def inside(root: Path, name: str, *, key: str) -> Path:
    """``root / name``; DataError if the name from an annotation file is absolute or climbs out of the root."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0]:
        raise DataError(f"Sample {key}: the file name {name!r} leads out of the data root {root}.")
    return root / name


def shuffled(count: int, key: str) -> list[int]:
    """An order of 0 ... count-1 that depends on the key alone."""
    return sorted(range(count), key=lambda i: blake2b(f"{key}\x1f{i}".encode(), digest_size=8).digest())
