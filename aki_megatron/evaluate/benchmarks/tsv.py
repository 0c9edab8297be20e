"""VLMEvalKit's tables: TSV with images in base64.

Images stay in the file until they are asked for: a table has up to 1.5 GB of them. An image cell of at most 64
characters is the index of the row that holds the image; a list written as text holds several images. A table without
images names files instead (column image_path), as VLMEvalKit's ``_local.tsv`` does.
"""

import ast
import base64
import binascii
import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks.benchmark import Record
from aki_megatron.evaluate.benchmarks.question import ImageSource

MAX_REFERENCE_LENGTH = 64
"""A shorter image cell is the index of another row."""

# one cell holds an image; the csv module's own limit is 128 KiB
_MAX_CELL = 2**31 - 1


@dataclass(frozen=True)
class TsvImage:
    """One image of a row. ``offset`` is where the row begins in the file, ``number`` counts its images from 0."""

    path: Path
    offset: int
    column: int
    number: int
    where: str

    def read(self) -> bytes:
        """Return the decoded bytes. Raises DataError for text that is no base64."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            cells = next(_rows(file))[1]
        cell = cells[self.column]
        texts = _as_list(cell, self.where)
        try:
            return base64.b64decode("".join(texts[self.number].split()), validate=True)
        except (binascii.Error, ValueError, IndexError) as error:
            raise DataError(f"{self.where}: image {self.number} is no base64 ({error}).") from error


@dataclass(frozen=True)
class ImageFile:
    """An image in a file of its own, which is looked for in several folders."""

    candidates: tuple[Path, ...]
    where: str

    def read(self) -> bytes:
        """Return the file's bytes. Raises DataError where it is in none of the folders."""
        for path in self.candidates:
            if path.is_file():
                return path.read_bytes()
        places = ", ".join(map(str, self.candidates))
        raise DataError(f"{self.where}: its image is missing; looked for {places}.")


def md5_of(path: Path) -> str:
    """Return the MD5 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def read_tsv_records(path: Path) -> list[Record]:
    """Read all rows without their images. Raises DataError for a table without header or with ragged rows."""
    with path.open("rb") as file:
        rows = _rows(file)
        header = [name.strip() for name in next(rows, (0, [""]))[1]]
        if "index" not in header or "question" not in header:
            raise DataError(
                f"{path} is no table of VLMEvalKit: its columns are {header[:12]}, and index or question is missing."
            )
        image_column = header.index("image") if "image" in header else None
        parsed: list[tuple[dict[str, str], int, str]] = []
        image_rows: dict[str, tuple[int, int]] = {}
        for number, (offset, cells) in enumerate(rows, start=1):
            where = f"{path}: row {number}"
            if len(cells) != len(header):
                raise DataError(f"{where} has {len(cells)} cells, the header {len(header)}; the file is damaged.")
            values = dict(zip(header, cells, strict=True))
            image = values.pop("image", "")
            if len(image) > MAX_REFERENCE_LENGTH:
                image_rows[values["index"]] = (offset, len(_as_list(image, where)))
                image = values["index"]
            parsed.append((values, number, image))
    return [
        Record(values, _images(path, values, reference, image_rows, image_column, number), f"{path}: row {number}")
        for values, number, reference in parsed
    ]


def _images(
    path: Path,
    values: dict[str, str],
    reference: str,
    image_rows: dict[str, tuple[int, int]],
    column: int | None,
    number: int,
) -> tuple[ImageSource, ...]:
    """Return the images of a row: its own, those of the row it names, or files."""
    where = f"{path}: row {number} (index {values['index']})"
    if column is not None:
        if not reference:
            return ()
        if reference not in image_rows:
            raise DataError(f"{where}: its image is that of row {reference!r}, which has none.")
        offset, count = image_rows[reference]
        return tuple(TsvImage(path, offset, column, item, where) for item in range(count))
    names = _as_list(values["image_path"], where) if values.get("image_path") else [f"{values['index']}.png"]
    folders = [path.parent, path.parent / "images" / path.stem.removesuffix("_local")]
    return tuple(ImageFile(tuple(folder / name for folder in folders), where) for name in names)


def _as_list(cell: str, where: str) -> list[str]:
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell]
    try:
        value: Any = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError) as error:
        raise DataError(f"{where}: a list of images is damaged.") from error
    return [str(item) for item in value]


def _rows(file: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield (offset in the file, cells) of every row from the current offset on; a cell may hold line breaks."""
    csv.field_size_limit(_MAX_CELL)
    offset = file.tell()
    consumed = offset

    def lines() -> Iterator[str]:
        nonlocal consumed
        for line in file:
            consumed += len(line)
            yield line.decode("utf-8-sig" if consumed == len(line) else "utf-8", errors="replace")

    reader = csv.reader(lines(), delimiter="\t")
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file.name}: the row at byte {offset} is damaged ({error}).") from error
        if cells:
            yield offset, cells
        offset = consumed
