"""Records of users' own conversations in parquet files, as Hugging Face datasets store them. Adapter of pyarrow.

Only the footers are read when files are opened: how many rows each row group has, and which columns. A row group is
read when a row of it is asked for, and the latest ones are kept, so rows should be asked for in an order that stays
within a few row groups (ShardOrder).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from aki_megatron.data.sources.chat_files import ChatRecords, FileRecord
from aki_megatron.data.sources.chat_record import RecordLayout, count_turns, image_content, parse_record
from aki_megatron.data.sources.records import MALFORMED, MAX_SHOWN, error_reason
from aki_megatron.errors import DataError

MAX_CACHED_BYTES = 2**28
"""Size of the row groups that a process keeps; at least one is kept."""


class RowGroupCache:
    """Row groups that were read last, by any hashable name. Safe to share between threads: it is replaced, not changed.

    num_read  row groups read so far
    """

    def __init__(self, max_bytes: int = MAX_CACHED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._tables: dict[Any, pyarrow.Table] = {}
        self.num_read = 0

    def get(self, name: Any) -> pyarrow.Table | None:
        """Return a row group that is kept, which becomes the last one to be dropped."""
        table = self._tables.get(name)
        if table is not None:
            self._tables = {other: kept for other, kept in self._tables.items() if other != name} | {name: table}
        return table

    def put(self, name: Any, table: pyarrow.Table) -> None:
        """Keep a row group, and drop those that were used least recently where all together are too large."""
        self.num_read += 1
        tables = {**self._tables, name: table}
        total = sum(kept.nbytes for kept in tables.values())
        for other in list(tables)[:-1]:
            if total <= self._max_bytes:
                break
            total -= tables.pop(other).nbytes
        self._tables = tables

    @property
    def num_bytes(self) -> int:
        """Size of the row groups that are kept."""
        return sum(table.nbytes for table in self._tables.values())


class ParquetRecords(ChatRecords):
    """The rows of one parquet file.

    group_counts  rows of each row group

    Raises DataError for a file that cannot be read or lacks the column of messages, or one that is named.
    """

    def __init__(
        self,
        file: Path,
        layout: RecordLayout,
        roots: Sequence[Path],
        cache: RowGroupCache,
        required: Mapping[str, str] | None = None,
    ) -> None:
        """Read the footer; ``required`` are the columns that the configuration names, by the key that names them."""
        self._file, self._layout, self._roots, self._cache = file, layout, roots, cache
        with self._errors(), parquet.ParquetFile(file) as opened:
            metadata, names = opened.metadata, opened.schema_arrow.names
            self.group_counts: NDArray[np.int64] = np.array(
                [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], dtype=np.int64
            )
            self._leaves = [opened.schema.column(number).path for number in range(len(opened.schema.names))]
            self._complete_bytes = [
                _columns_without_null(metadata.row_group(group)) for group in range(metadata.num_row_groups)
            ]
        for key, name in (required or {}).items():
            if name not in names:
                raise DataError(f"{file} has no column {name!r} (columns.{key}); it has {names}.")
        self._messages = next((name for name in layout.messages if name in names), None)
        if self._messages is None:
            raise DataError(
                f"{file} has no column {' or '.join(map(repr, layout.messages))}; it has {names}. Name the one that "
                "holds the messages: columns: {messages: NAME}."
            )
        self._images = [name for name in layout.images if name in names]
        self._columns = [self._messages, *self._images, *(name for name in layout.id if name in names)]
        self._ends = np.cumsum(self.group_counts)
        super().__init__(int(self.group_counts.sum()))

    def read(self, index: int) -> FileRecord:
        return self._record(index, self._row(index, whole=True))

    @property
    def counts(self) -> NDArray[np.int64]:
        return self.group_counts

    def read_text(self, index: int) -> FileRecord:
        return self._record(index, self._row(index, whole=False))

    def locate(self, index: int) -> str:
        return f"{self._file}, row {index}"

    def turn_counts(self) -> list[int]:
        """Return the number of answers of every row, of a bad one 1; reads the messages of the whole file."""
        found: list[int] = []
        for group in range(len(self.group_counts)):
            with self._errors(), parquet.ParquetFile(self._file) as opened:
                table = opened.read_row_group(group, columns=[self._messages], use_threads=False)
                values = table.column(self._messages).to_pylist()
            found += (self._count_turns(value) for value in values)
        return found

    def _count_turns(self, value: Any) -> int:
        try:
            return count_turns(_from_text(value), self._layout)
        except MALFORMED:
            return 1

    def _record(self, index: int, row: dict[str, Any]) -> FileRecord:
        try:
            assert self._messages is not None
            row[self._messages] = _from_text(row[self._messages])
            chat = parse_record(row, self._layout)
            for image in chat.images:
                image_content(image, self._roots)
        except MALFORMED as error:
            name = next((f" ({key} {str(row[key])[:MAX_SHOWN]})" for key in self._layout.id if row.get(key)), "")
            raise DataError(f"{self._file}, row {index}{name}: {error_reason(error)}") from error
        return FileRecord(self._file, index, f"row {index}", chat)

    def _row(self, index: int, *, whole: bool) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        spared = [] if whole else self._spared_columns(group)
        name = (self._file, group, not spared)
        table = self._cache.get(name)
        if table is None and spared:
            table = self._cache.get((self._file, group, True))
            spared = spared if table is None else []
        if table is None:
            columns = self._columns if not spared else [leaf for leaf in self._wanted_leaves() if leaf not in spared]
            with self._errors(), parquet.ParquetFile(self._file) as opened:
                table = opened.read_row_group(group, columns=columns, use_threads=False)
            self._cache.put(name, table)
        offset = index - int(self._ends[group] - self.group_counts[group])
        row: dict[str, Any] = table.slice(offset, 1).to_pylist()[0]
        if spared:
            for column in self._images:
                row[column] = _without_bytes(row.get(column))
        return row

    def _wanted_leaves(self) -> list[str]:
        return [leaf for leaf in self._leaves if leaf.split(".")[0] in self._columns]

    def _spared_columns(self, group: int) -> list[str]:
        """Return the columns of image bytes that the text of a row group is read without.

        Only where every image has bytes: one without is found by its path, which may be refused, and the text of a
        record must be good exactly where the whole record is.
        """
        complete = self._complete_bytes[group]
        leaves = [leaf for leaf in self._wanted_leaves() if leaf.split(".")[0] in self._images]
        found = [leaf for leaf in leaves if leaf.endswith(".bytes") and leaf in complete]
        has_path = all(f"{leaf.removesuffix('bytes')}path" in leaves for leaf in found)
        all_found = len(found) == sum(leaf.endswith(".bytes") for leaf in leaves)
        return found if has_path and all_found else []

    def _errors(self) -> "_ParquetErrors":
        return _ParquetErrors(self._file)


class _ParquetErrors:
    """Turn what pyarrow raises into a DataError that names the file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, pyarrow.ArrowException | OSError):
            raise DataError(f"{self._file} is not a readable parquet file: {error}") from error


def _columns_without_null(row_group: Any) -> frozenset[str]:
    """Return the paths of the columns of a row group of which every value is there."""
    found = set()
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        statistics = column.statistics
        if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
            found.add(column.path_in_schema)
    return frozenset(found)


def _from_text(value: Any) -> Any:
    """Return messages that a table holds as JSON text as a list."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"the messages are not valid JSON: {error.msg} (character {error.pos})") from error


def _without_bytes(value: Any) -> Any:
    """Return the images of a row as empty ones, as many."""
    if isinstance(value, list):
        return [_without_bytes(image) for image in value]
    return None if value is None else b""
