"""Webdataset tars from pictures with captions that lie in a folder or in a table (CSV or parquet).

Every picture is decoded once before it goes into a tar: what a run could not read is named now, not on the tenth day.
The bytes of a tar follow from the pictures and captions alone; pictures are copied as they are, never encoded anew.
"""

import csv
import io
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.image import decode_image
from aki_megatron.data.tar_index import index_path, write_index
from aki_megatron.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
TOLERATED = 8
"""Rows that may be unusable in any case: a share means nothing over the first few hundred."""

_PARTIAL = ".partial"
_TAR = re.compile(r"\d{5,}\.tar")
_WINDOW = 64
_CHECK_PIXELS = 8
_MAGIC = {"jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}
"""Suffix of a picture in a tar -> how its bytes begin."""
_NEED_PYARROW = "TokenSegments parquet needs pyarrow: pip install pyarrow (or: pip install 'aki-megatron[parquet]')."


class Pair(NamedTuple):
    """One row: where it comes from, its picture (a file, its bytes, or why there is none) and its caption."""

    name: str
    image: Path | bytes | DataError
    caption: str


@dataclass(frozen=True)
class Origin:
    """Rows in a fixed order, read as they are asked for, and how many there are."""

    total: int
    pairs: Iterator[Pair]


@dataclass
class Written:
    """What write_shards made: the tars in order, how many samples, and every row that was left out, with the reason."""

    tars: list[Path] = field(default_factory=list)
    samples: int = 0
    left_out: list[str] = field(default_factory=list)


def pairs_of_folder(folder: Path) -> Origin:
    """Pictures below ``folder``, sorted by name, each with the text of the same name (``a/7.jpg``, ``a/7.txt``)."""
    if not folder.is_dir():
        raise DataError(f"--folder {folder} is no folder.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise DataError(f"{folder} holds no picture; looked for {', '.join(IMAGE_SUFFIXES)} in it and its subfolders.")

    def read(image: Path) -> Pair:
        name, text = image.relative_to(folder).as_posix(), image.with_suffix(".txt")
        try:
            return Pair(name, image, text.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            return Pair(name, DataError(f"its caption {text.name} cannot be read: {error}"), "")

    return Origin(len(files), map(read, files))


def pairs_of_table(table: Path, image_column: str, caption_column: str, image_root: Path | None = None) -> Origin:
    """The rows of a CSV or parquet file. A picture is its bytes (parquet), a struct with ``bytes``, or a path.

    Paths start at ``image_root`` (the table's folder where it is None) and may not lead out of it.
    Raises DataError for a table that cannot be read or lacks a column.
    """
    root = image_root or table.parent
    columns = (image_column, caption_column)
    if not table.is_file():
        raise DataError(f"--table {table} does not exist.")
    if table.suffix.lower() in (".parquet", ".pq"):
        total, rows = _parquet_rows(table, columns)
    elif table.suffix.lower() == ".csv":
        total, rows = _csv_rows(table, columns)
    else:
        raise DataError(f"--table {table}: its name must end in .parquet, .pq or .csv.")
    return Origin(total, (_pair(f"{table.name} row {n}", row, root) for n, row in enumerate(rows, start=1)))


def brace_pattern(tars: list[Path]) -> str:
    """How a run's config names the tars: ``{00000..00041}.tar``."""
    first, last = tars[0].stem, tars[-1].stem
    return f"{first}.tar" if first == last else f"{{{first}..{last}}}.tar"


def write_shards(
    origin: Origin,
    out: Path,
    *,
    per_shard: int,
    max_bad_fraction: float,
    overwrite: bool,
    workers: int,
    progress: Callable[[int, str], None],
) -> Written:
    """Write ``00000.tar`` ... of ``per_shard`` samples each and their indexes into ``out``.

    ``progress`` is called with the number of rows done and, for one that is left out, the reason. All is written aside
    and moved into place at the end. Raises DataError when tars are there already (without ``overwrite``), when more
    rows are unusable than max(TOLERATED, max_bad_fraction x rows) - 0 means none - and when none is usable.
    """
    if per_shard < 1 or not 0 <= max_bad_fraction <= 1 or workers < 1:
        raise DataError(
            f"per_shard={per_shard} and workers={workers} must be at least 1, max_bad_fraction={max_bad_fraction} "
            "must lie between 0 and 1."
        )
    old = sorted(path for path in out.glob("*.tar") if _TAR.fullmatch(path.name)) if out.is_dir() else []
    if old and not overwrite:
        raise DataError(
            f"{out} holds {len(old)} tars already ({old[0].name} ...); choose another --out, or --overwrite."
        )
    try:
        return _replace(old, out, lambda folder: _fill(origin, folder, per_shard, max_bad_fraction, workers, progress))
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}") from error


def _replace(old: list[Path], out: Path, fill: Callable[[Path], Written]) -> Written:
    """Let ``fill`` write tars and indexes aside, then put them where the old ones are."""
    partial = out / _PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        written = fill(partial)
        for path in old:
            index_path(path).unlink(missing_ok=True)
            path.unlink()
        for path in written.tars:
            path.rename(out / path.name)
            index_path(path).rename(index_path(out / path.name))
    finally:
        shutil.rmtree(partial)
    written.tars = [out / path.name for path in written.tars]
    return written


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a file without a date or an owner, so that equal contents make equal tars."""
    member = tarfile.TarInfo(name)  # mtime 0, mode 0644, no owner
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _fill(
    origin: Origin, folder: Path, per_shard: int, max_bad_fraction: float, workers: int, progress: Callable[..., None]
) -> Written:
    """Write the tars and their indexes into an empty folder."""
    written = Written()
    allowed = max(TOLERATED, int(max_bad_fraction * origin.total)) if max_bad_fraction else 0
    digits = max(5, len(str(origin.total // per_shard)))
    tar: tarfile.TarFile | None = None
    try:
        for done, (pair, checked) in enumerate(_checked(origin.pairs, workers), start=1):
            if isinstance(checked, DataError):
                written.left_out.append(f"{pair.name}: {checked}")
                progress(done, written.left_out[-1])
                if len(written.left_out) > allowed:
                    raise _too_many(written.left_out, done, origin.total, allowed)
                continue
            if written.samples % per_shard == 0:
                _finish(tar)
                path = folder / f"{len(written.tars):0{digits}}.tar"
                tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed by _finish)
                written.tars.append(path)
            assert tar is not None
            key = f"{written.samples:09}"
            add_member(tar, f"{key}.{_suffix(checked)}", checked)
            add_member(tar, f"{key}.txt", pair.caption.encode())
            written.samples += 1
            progress(done, "")
    finally:
        _finish(tar)
    if not written.samples:
        raise DataError(f"None of the {origin.total} rows could be used. The first: {written.left_out[:3]}")
    return written


def _finish(tar: tarfile.TarFile | None) -> None:
    if tar is not None:
        tar.close()
        write_index(Path(str(tar.name)))


def _too_many(left_out: list[str], done: int, total: int, allowed: int) -> DataError:
    listing = "\n  ".join(left_out[:10])
    return DataError(
        f"{len(left_out)} of the first {done} rows (of {total}) cannot be used, {allowed} may. Nothing was written. "
        f"Mend or remove them, or raise --max_bad_fraction. The first:\n  {listing}"
    )


def _checked(pairs: Iterator[Pair], workers: int) -> Iterator[tuple[Pair, bytes | DataError]]:
    """Every row with its picture's bytes or what is wrong, in order; decoded in threads, some rows at a time."""
    with ThreadPoolExecutor(workers) as pool:
        while window := list(islice(pairs, _WINDOW)):
            yield from zip(window, pool.map(_check, window), strict=True)


def _check(pair: Pair) -> bytes | DataError:
    if isinstance(pair.image, DataError):
        return pair.image
    if not pair.caption.strip():
        return DataError("the caption is empty")
    try:
        data = pair.image.read_bytes() if isinstance(pair.image, Path) else pair.image
        decode_image(data, _CHECK_PIXELS, key="")
    except OSError as error:
        return DataError(f"the picture cannot be read: {error}")
    except DataError as error:
        return error
    return data if _suffix(data) else DataError("the picture is neither a JPEG nor a PNG; convert it")


def _suffix(data: bytes) -> str:
    return next((suffix for suffix, magic in _MAGIC.items() if data.startswith(magic)), "")


def _pair(name: str, row: tuple[Any, Any], root: Path) -> Pair:
    image, caption = row
    if isinstance(image, dict):  # as the datasets library stores pictures
        image = image.get("bytes") or image.get("path")
    if not isinstance(caption, str):
        return Pair(name, DataError(f"the caption is no text but {type(caption).__name__}"), "")
    if isinstance(image, bytes):
        return Pair(name, image, caption)
    if not isinstance(image, str) or not image:
        return Pair(name, DataError(f"the picture is neither a path nor bytes but {type(image).__name__}"), caption)
    if "://" in image:
        raise DataError(
            f"{name}: the picture {image!r} is an address. Pictures are not downloaded here; do it first, "
            "for example with img2dataset (its tars can be trained on as they are), and give paths or bytes."
        )
    path = (root / image).resolve()
    if not path.is_relative_to(root.resolve()):
        return Pair(name, DataError(f"the path {image!r} leads out of {root}; see --image_root"), caption)
    return Pair(name, path, caption)


def _lacking(table: Path, columns: tuple[str, str], there: list[str]) -> DataError | None:
    missing = [column for column in columns if column not in there]
    if not missing:
        return None
    return DataError(f"{table} has no column {missing}; there are {there}. Give --image_column and --caption_column.")


def _csv_rows(table: Path, columns: tuple[str, str]) -> tuple[int, Iterator[tuple[Any, Any]]]:
    """Rows of a CSV file with a header line, UTF-8."""
    csv.field_size_limit(sys.maxsize)

    def rows() -> Iterator[tuple[Any, Any]]:
        with table.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file):
                yield row[columns[0]], row[columns[1]]

    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            if lacking := _lacking(table, columns, next(reader, [])):
                raise lacking
            return sum(bool(row) for row in reader), rows()
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table} is not a CSV file in UTF-8: {error}") from error


def _parquet_rows(table: Path, columns: tuple[str, str]) -> tuple[int, Iterator[tuple[Any, Any]]]:
    """Rows of a parquet file, a few at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(_NEED_PYARROW) from error
    try:
        opened = parquet.ParquetFile(table)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table} is not a readable parquet file: {error}") from error
    if lacking := _lacking(table, columns, list(opened.schema_arrow.names)):
        raise lacking

    def rows() -> Iterator[tuple[Any, Any]]:
        try:
            for batch in opened.iter_batches(batch_size=_WINDOW, columns=list(dict.fromkeys(columns))):
                images, captions = (batch.column(name).to_pylist() for name in columns)
                yield from zip(images, captions, strict=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{table} is damaged: {error}") from error

    return opened.metadata.num_rows, rows()
