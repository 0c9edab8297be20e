"""Write webdataset tars from images with captions in a folder or in a table (CSV or parquet).

Every image is decoded once before it goes into a tar, so that unreadable ones are reported now and not by a run.
The bytes of a tar depend on the images and captions alone; images are copied as they are, never encoded anew.
"""

import csv
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from webdataset.writer import TarWriter

from aki_megatron.data.captions import is_blip3_ocr
from aki_megatron.data.file_kind import HEAD_BYTES, file_kind
from aki_megatron.data.image import decode_image
from aki_megatron.data.tar_index import index_path, write_index
from aki_megatron.data.tar_scan import IMAGE_SUFFIXES
from aki_megatron.errors import DataError

ALWAYS_TOLERATED = 8
"""Records that may be unusable whatever the fraction is, unless it is 0: a fraction is noisy early on."""

_STAGING = ".partial"
_TAR = re.compile(r"\d{5,}\.tar")
_WINDOW = 64
_CHECK_PIXELS = 8
_SUFFIXES = {
    "a JPEG image": "jpg",
    "a PNG image": "png",
    "a WEBP image": "webp",
    "a GIF image": "gif",
    "a BMP image": "bmp",
    "a TIFF image": "tif",
    "an AVIF image": "avif",
    "a JPEG 2000 image": "jp2",
}
"""Kind of an image, by its first bytes -> its suffix in a tar."""


class ImageTextPair(NamedTuple):
    """One record: where it comes from, its image (a file, its bytes, or why there is none) and its caption."""

    name: str
    image: Path | bytes | DataError
    caption: str


@dataclass(frozen=True)
class PairSource:
    """Image-text pairs in a fixed order, read lazily, and how many there are."""

    total: int
    pairs: Iterator[ImageTextPair]


@dataclass
class WrittenShards:
    """What write_shards wrote: the tars in order, the number of samples, and every skipped record with the reason."""

    tars: list[Path] = field(default_factory=list)
    num_samples: int = 0
    skipped: list[str] = field(default_factory=list)
    text_format: str = "caption"
    """data.captions.format of the texts, as the first one tells."""


def pairs_from_folder(folder: Path) -> PairSource:
    """Return the images below ``folder`` by name, each with the text of the same name (``a/7.jpg``, ``a/7.txt``)."""
    if not folder.is_dir():
        raise DataError(f"--folder {folder} is no folder.")
    suffixes = {f".{suffix}" for suffix in IMAGE_SUFFIXES}
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in found if path.suffix.lower() in suffixes]
    if not files:
        raise DataError(f"{folder} holds no image; looked for {', '.join(IMAGE_SUFFIXES)} in it and its subfolders.")

    def read(image: Path) -> ImageTextPair:
        name, text = image.relative_to(folder).as_posix(), image.with_suffix(".txt")
        try:
            return ImageTextPair(name, image, text.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            return ImageTextPair(name, DataError(f"its caption {text.name} cannot be read: {error}"), "")

    def leave_out(path: Path) -> ImageTextPair:
        is_text = path.suffix == ".txt"
        reason = "there is no image of its name" if is_text else "its suffix is that of no image"
        reason += f"; read are {', '.join(IMAGE_SUFFIXES)}"
        return ImageTextPair(path.relative_to(folder).as_posix(), DataError(reason), "")

    others = _captioned_others(found, files)
    return PairSource(len(files) + len(others), chain(map(read, files), map(leave_out, others)))


def _captioned_others(found: list[Path], images: list[Path]) -> list[Path]:
    """Return the files with a text of their name that are no image, and the texts that no file has the name of."""
    texts = {path.with_suffix("") for path in found if path.suffix == ".txt"}
    others = [path for path in found if path.suffix not in (".txt", ".json") and path.with_suffix("") in texts]
    named = {path.with_suffix("") for path in others}
    return sorted({*others} - {*images} | {stem.with_name(f"{stem.name}.txt") for stem in texts - named})


def pairs_from_table(table: Path, image_column: str, caption_column: str, image_root: Path | None = None) -> PairSource:
    """Return the records of a CSV or parquet file. An image is its bytes (parquet), a struct with ``bytes``, or a path.

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
    return PairSource(total, (_pair(f"{table.name} row {n}", row, root) for n, row in enumerate(rows, start=1)))


def brace_pattern(tars: list[Path]) -> str:
    """Return the pattern that names the tars in a run's configuration: ``{00000..00041}.tar``."""
    first, last = tars[0].stem, tars[-1].stem
    return f"{first}.tar" if first == last else f"{{{first}..{last}}}.tar"


def run_configuration(out: Path, written: WrittenShards) -> str:
    """Return the lines of a run's configuration that read what was written into ``out``."""
    lines = [
        "data:",
        "  kind: captions",
        f"  root: {_yaml_scalar(str(out))}",
        "  captions:",
        f"    - name: {_yaml_scalar(out.resolve().name or 'captions')}",
        f'      shards: ["{brace_pattern(written.tars)}"]',
    ]
    return "\n".join(lines + [f"      format: {written.text_format}"] * (written.text_format != "caption"))


def _yaml_scalar(text: str) -> str:
    """Return a text as YAML writes it, quoted where it must be."""
    return yaml.safe_dump([text], default_flow_style=True, width=sys.maxsize, allow_unicode=True)[1:-2]


def write_shards(
    source: PairSource,
    out: Path,
    *,
    per_shard: int,
    max_bad_fraction: float,
    overwrite: bool,
    num_workers: int,
    progress: Callable[[int, str], None],
) -> WrittenShards:
    """Write ``00000.tar`` ... of ``per_shard`` samples each and their indices into ``out``.

    ``progress`` is called with the number of records done and, for one that is skipped, the reason. Everything is
    written to a staging folder and moved into place at the end. Raises DataError when tars are there already (without
    ``overwrite``), when more records are unusable than max(ALWAYS_TOLERATED, max_bad_fraction x records) - 0 means
    none - and when none is usable.
    """
    if per_shard < 1 or not 0 <= max_bad_fraction <= 1 or num_workers < 1:
        raise DataError(
            f"per_shard={per_shard} and workers={num_workers} must be at least 1, max_bad_fraction={max_bad_fraction} "
            "must lie between 0 and 1."
        )
    old = sorted(path for path in out.glob("*.tar") if _TAR.fullmatch(path.name)) if out.is_dir() else []
    if old and not overwrite:
        raise DataError(
            f"{out} holds {len(old)} tars already ({old[0].name} ...); choose another --out, or --overwrite."
        )
    try:
        return _write_and_swap(
            old, out, lambda folder: _write(source, folder, per_shard, max_bad_fraction, num_workers, progress)
        )
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error}") from error


def _write_and_swap(old: list[Path], out: Path, write: Callable[[Path], WrittenShards]) -> WrittenShards:
    """Let ``write`` fill a staging folder with tars and indices, then move them to where the old ones are."""
    staging = out / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        written = write(staging)
        for path in old:
            index_path(path).unlink(missing_ok=True)
            path.unlink()
        for path in written.tars:
            path.rename(out / path.name)
            index_path(path).rename(index_path(out / path.name))
    finally:
        shutil.rmtree(staging)
    written.tars = [out / path.name for path in written.tars]
    return written


class SampleWriter:
    """Write one tar through webdataset's own writer; without dates or owners, so that equal samples give equal tars."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._tar = TarWriter(self._file, encoder=False, user="", group="", mode=0o644, mtime=0)

    def write(self, key: str, suffix: str, image: bytes, text: str) -> None:
        """Append a sample: its image and its text."""
        self._tar.write({"__key__": key, suffix: image, "txt": text.encode()})

    def close(self) -> None:
        """Write the tar's end mark and close it."""
        try:
            self._tar.close()
        finally:
            self._file.close()


def _write(
    source: PairSource,
    folder: Path,
    per_shard: int,
    max_bad_fraction: float,
    num_workers: int,
    progress: Callable[..., None],
) -> WrittenShards:
    """Write the tars and their indices into an empty folder."""
    written = WrittenShards()
    allowed = max(ALWAYS_TOLERATED, int(max_bad_fraction * source.total)) if max_bad_fraction else 0
    digits = max(5, len(str(source.total // per_shard)))
    tar: SampleWriter | None = None
    try:
        for done, (pair, checked) in enumerate(_check_images(source.pairs, num_workers), start=1):
            if isinstance(checked, DataError):
                written.skipped.append(f"{pair.name}: {checked}")
                progress(done, written.skipped[-1])
                if len(written.skipped) > allowed:
                    raise _too_many(written.skipped, done, source.total, allowed)
                continue
            if written.num_samples % per_shard == 0:
                _finish(tar)
                tar = SampleWriter(folder / f"{len(written.tars):0{digits}}.tar")
                written.tars.append(tar.path)
            assert tar is not None
            if not written.num_samples and is_blip3_ocr(pair.caption):
                written.text_format = "blip3_ocr"
            tar.write(f"{written.num_samples:09}", _suffix(checked), checked, pair.caption)
            written.num_samples += 1
            progress(done, "")
    finally:
        _finish(tar)
    if not written.num_samples:
        raise DataError(f"None of the {source.total} records could be used. The first: {written.skipped[:3]}")
    return written


def _finish(tar: SampleWriter | None) -> None:
    if tar is not None:
        tar.close()
        write_index(tar.path)


def _too_many(skipped: list[str], done: int, total: int, allowed: int) -> DataError:
    listing = "\n  ".join(skipped[:10])
    return DataError(
        f"{len(skipped)} of the first {done} records (of {total}) cannot be used, {allowed} may. Nothing was written. "
        f"Repair or remove them, or raise --max_bad_fraction. The first:\n  {listing}"
    )


def _check_images(
    pairs: Iterator[ImageTextPair], num_workers: int
) -> Iterator[tuple[ImageTextPair, bytes | DataError]]:
    """Yield every record with its image's bytes or what is wrong, in order; decoded in threads, a window at a time."""
    with ThreadPoolExecutor(num_workers) as pool:
        while window := list(islice(pairs, _WINDOW)):
            yield from zip(window, pool.map(_check, window), strict=True)


def _check(pair: ImageTextPair) -> bytes | DataError:
    if isinstance(pair.image, DataError):
        return pair.image
    if not pair.caption.strip():
        return DataError("the caption is empty")
    try:
        data = pair.image.read_bytes() if isinstance(pair.image, Path) else pair.image
        decode_image(data, _CHECK_PIXELS, key="")
    except OSError as error:
        return DataError(f"the image cannot be read: {error}")
    except DataError as error:
        return error
    return data if _suffix(data) else DataError("its format has no suffix in a tar; convert it to JPEG or PNG")


def _suffix(data: bytes) -> str:
    return _SUFFIXES.get(file_kind(data[:HEAD_BYTES]), "")


def _pair(name: str, record: tuple[Any, Any], root: Path) -> ImageTextPair:
    image, caption = record
    if isinstance(image, dict):  # as the datasets library stores images
        image = image.get("bytes") or image.get("path")
    if not isinstance(caption, str):
        return ImageTextPair(name, DataError(f"the caption is no text but {type(caption).__name__}"), "")
    if isinstance(image, bytes):
        return ImageTextPair(name, image, caption)
    if image == "" or image is None:
        return ImageTextPair(name, DataError("there is no image in this row"), caption)
    if not isinstance(image, str):
        return ImageTextPair(
            name, DataError(f"the image is neither a path nor bytes but {type(image).__name__}"), caption
        )
    if "://" in image:
        raise DataError(
            f"{name}: the image {image!r} is an address. Images are not downloaded here; do it first, "
            "for example with img2dataset (its tars can be trained on as they are), and give paths or bytes."
        )
    path = (root / image).resolve()
    if not path.is_relative_to(root.resolve()):
        return ImageTextPair(name, DataError(f"the path {image!r} leads out of {root}; see --image_root"), caption)
    return ImageTextPair(name, path, caption)


def _missing_columns(table: Path, columns: tuple[str, str], found: list[str]) -> DataError | None:
    missing = [column for column in columns if column not in found]
    if not missing:
        return None
    return DataError(f"{table} has no column {missing}; there are {found}. Give --image_column and --caption_column.")


def _csv_rows(table: Path, columns: tuple[str, str]) -> tuple[int, Iterator[tuple[Any, Any]]]:
    """Return the number of records of a UTF-8 CSV file with a header line, and (image, caption) of each."""
    csv.field_size_limit(sys.maxsize)

    def rows() -> Iterator[tuple[Any, Any]]:
        with table.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, strict=True):
                yield row[columns[0]], row[columns[1]]

    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            # strict: a quotation mark that is never closed would make one caption of all that follows
            reader = csv.reader(file, strict=True)
            try:
                if missing := _missing_columns(table, columns, next(reader, [])):
                    raise missing
                return sum(bool(row) for row in reader), rows()
            except csv.Error as error:
                raise DataError(f"{table} is not a valid CSV file: {error} (up to line {reader.line_num}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{table} is not a CSV file in UTF-8: {error}") from error


def _parquet_rows(table: Path, columns: tuple[str, str]) -> tuple[int, Iterator[tuple[Any, Any]]]:
    """Return the number of records of a parquet file, and (image, caption) of each, read in windows."""
    # imported here: it takes a while, and folders and CSV files do without
    import pyarrow
    from pyarrow import parquet

    try:
        opened = parquet.ParquetFile(table)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{table} is not a readable parquet file: {error}") from error
    if missing := _missing_columns(table, columns, list(opened.schema_arrow.names)):
        raise missing

    def rows() -> Iterator[tuple[Any, Any]]:
        try:
            for batch in opened.iter_batches(batch_size=_WINDOW, columns=list(dict.fromkeys(columns))):
                images, captions = (batch.column(name).to_pylist() for name in columns)
                yield from zip(images, captions, strict=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{table} is damaged: {error}") from error

    return opened.metadata.num_rows, rows()
