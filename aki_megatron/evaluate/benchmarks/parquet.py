"""Parquet files of the Hugging Face hub, read through pyarrow; images stay in the file until they are asked for."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.benchmark import Record
from aki_megatron.evaluate.benchmarks.question import ImageSource

_NEED_PYARROW = "Reading parquet needs pyarrow: pip install pyarrow."


class ParquetImages:
    """Image columns of one file; the last column of a row group that was read is kept. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._last: tuple[tuple[int, str], Any] | None = None
        self._lock = threading.Lock()

    def cell(self, row_group: int, column: str, row: int) -> Any:
        """Return a cell as Python value."""
        with self._lock:
            if self._last is None or self._last[0] != (row_group, column):
                if self._file is None:
                    self._file = open_parquet(self.path)
                values = self._file.read_row_group(row_group, columns=[column]).column(column)
                self._last = ((row_group, column), values)
            values = self._last[1]
        return values[row].as_py()

    def __reduce__(self) -> tuple[type["ParquetImages"], tuple[Path]]:
        """Pickle the path: another process opens the file itself."""
        return ParquetImages, (self.path,)


@dataclass(frozen=True)
class ParquetImage:
    """One image: ``row`` counts within its row group, ``number`` within a list of images."""

    images: ParquetImages
    row_group: int
    row: int
    column: str
    number: int
    where: str

    def read(self) -> bytes:
        """Return the encoded bytes. Raises DataError where the file holds a path instead of an image."""
        cell = self.images.cell(self.row_group, self.column, self.row)
        item = cell[self.number] if isinstance(cell, list) else cell
        content = item.get("bytes") if isinstance(item, dict) else item
        if not isinstance(content, bytes):
            raise DataError(f"{self.where}: column {self.column} holds no image but {str(item)[:80]!r}.")
        return content


def open_parquet(path: Path) -> Any:
    """Return pyarrow's ParquetFile. Raises DataError without pyarrow and for a file that is none."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DataError(_NEED_PYARROW) from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is no parquet file ({error}); get it again.") from error


def read_parquet_records(path: Path) -> list[Record]:
    """Read all rows without their images."""
    file = open_parquet(path)
    image_columns = _image_columns(file.schema_arrow)
    plain = [name for name in file.schema_arrow.names if name not in image_columns]
    images = ParquetImages(path)
    records: list[Record] = []
    for group in range(file.num_row_groups):
        rows = file.read_row_group(group, columns=plain).to_pylist()
        counts = {column: _counts(file, group, column) for column in image_columns}
        for row, values in enumerate(rows):
            where = f"{path}: row {len(records)}"
            sources: tuple[ImageSource, ...] = tuple(
                ParquetImage(images, group, row, column, number, where)
                for column in image_columns
                for number in range(counts[column][row])
            )
            records.append(Record(values, sources, where))
    return records


def _image_columns(schema: Any) -> list[str]:
    """Return the columns of images: structs with ``bytes``, lists of them, or bytes themselves."""
    found = []
    for field in schema:
        kind = field.type
        if hasattr(kind, "value_type") and str(kind).startswith(("list", "large_list")):
            kind = kind.value_type
        is_struct = str(kind).startswith("struct") and kind.get_field_index("bytes") >= 0
        if is_struct or str(kind) in ("binary", "large_binary"):
            found.append(field.name)
    return found


def _counts(file: Any, group: int, column: str) -> Sequence[int]:
    """Return how many images each row of a row group has in a column; a missing image is a null."""
    leaves = [file.schema.column(number).path for number in range(len(file.schema))]
    # the paths of the images are enough to count them; a column without paths is read whole
    paths = [leaf for leaf in leaves if leaf.startswith(f"{column}.") and leaf.endswith(".path")]
    values = file.read_row_group(group, columns=paths[:1] or [column]).column(column)
    is_list = str(values.type).startswith(("list", "large_list"))
    return [(len(value) if is_list else 1) if value.is_valid else 0 for value in values]
