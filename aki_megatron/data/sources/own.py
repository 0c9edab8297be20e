"""Conversations in a user's own files: an entry of data.sources whose format is llava, messages or parquet."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from aki_megatron.config.data import SourceConfig
from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.shards import expand_shards
from aki_megatron.data.sources.chat_files import (
    ChatRecords,
    FileRecord,
    JsonArrayRecords,
    JsonLinesRecords,
    is_json_array,
)
from aki_megatron.data.sources.chat_record import LAYOUTS, RecordLayout, conversation
from aki_megatron.data.sources.records import LazyConversations, error_reason
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation

SUFFIXES = {"llava": (".json", ".jsonl"), "messages": (".json", ".jsonl"), "parquet": (".parquet", ".pq")}
"""Format -> suffixes of the files that are read of a folder."""


class _SampleRecord(NamedTuple):
    """Record number ``record`` of file number ``file``; one turn of it, or all where that is None."""

    file: int
    record: int
    turn: int | None


@dataclass(frozen=True)
class OwnSource:
    """The samples of a source.

    items      by number
    counts     samples of each part that is read as a whole (row groups of parquet); None where there are no such parts
    read_text  a sample whose images may be empty, where reading those costs; None: reading a sample costs little
    locate     file and line, entry or row of a sample
    """

    items: LazyConversations[Any]
    counts: NDArray[np.int64] | None
    read_text: Callable[[int], Conversation] | None
    locate: Callable[[int], str]


def source_files(root: Path, source: SourceConfig) -> list[Path]:
    """Return the files of a source, whether they exist or not; of a folder those of its format, by name.

    Raises DataError for a folder without any, and where the same file is named twice.
    """
    found: list[Path] = []
    for path in expand_shards(source.path, root):
        if not path.is_dir():
            found.append(path)
            continue
        suffixes = SUFFIXES[source.format]
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in suffixes and file.is_file())
        if not inside:
            raise DataError(f"The folder {path} of source {source.name} holds no {' or '.join(suffixes)} file.")
        found += inside
    twice = sorted({str(path) for path in found if found.count(path) > 1})
    if twice:
        raise DataError(f"Source {source.name} names {', '.join(twice)} more than once; each file may be named once.")
    return found


def images_folder(root: Path, source: SourceConfig) -> Path:
    """Return the folder at which the paths of a source's images start."""
    return root / source.images if source.images else root


def missing_own_files(root: Path, source: SourceConfig) -> list[str]:
    """Return the files and the folder of images of a source that do not exist, with the source that needs them."""
    try:
        needed = source_files(root, source)
    except DataError as error:
        return [str(error)]
    if source.images:
        needed.append(images_folder(root, source))
    return [f"{path} (data.sources {source.name})" for path in needed if not path.exists()]


def open_own(root: Path, source: SourceConfig) -> OwnSource:
    """Open a source. Bad records of JSON files are left out and counted in ``items.faults``.

    Those of parquet are found when they are asked for, and raise DataError then. Raises DataError for what cannot be
    read at all, and for a key that ``columns`` names and no record has.
    """
    if missing := missing_own_files(root, source):
        raise DataError("These files do not exist:\n  " + "\n  ".join(missing))
    files = source_files(root, source)
    roots = (images_folder(root, source), root)
    faults = FaultCounts()
    is_parquet = source.format == "parquet"
    parts = _open_parquet(files, source, roots) if is_parquet else _open_json(files, source, roots, faults)
    samples = _Samples(parts, _turn_counts(parts) if source.split_turns else None)
    build = partial(_conversation, source.name, roots, len(files) > 1)
    items = LazyConversations(samples, partial(_read, parts, build), faults)
    if not is_parquet:
        return OwnSource(items, None, None, samples.locate)
    return OwnSource(items, samples.group_counts(), partial(_read_text, samples, build), samples.locate)


def record_layout(source: SourceConfig) -> RecordLayout:
    """Return the names under which the records of a source hold their fields."""
    named = {key: (name,) for key, name in source.columns.model_dump().items() if name}
    return LAYOUTS[source.format]._replace(**named)


def _open_json(
    files: Iterable[Path], source: SourceConfig, roots: Sequence[Path], faults: FaultCounts
) -> list[ChatRecords]:
    layout = record_layout(source)
    parts: list[ChatRecords] = []
    keys: set[str] = set()
    for file in files:
        kind = JsonArrayRecords if is_json_array(file) else JsonLinesRecords
        part = kind(file, layout, roots, faults)
        keys |= part.keys
        parts.append(part)
    for key in ("messages", "images", "id"):
        name = getattr(source.columns, key)
        if name and keys and name not in keys:
            raise DataError(
                f"Source {source.name}: no record has the key {name!r} (columns.{key}); they have {sorted(keys)[:20]}."
            )
    return parts


def _open_parquet(files: Iterable[Path], source: SourceConfig, roots: Sequence[Path]) -> list[ChatRecords]:
    # imported here: pyarrow takes a while, and other formats do without
    from aki_megatron.data.sources.parquet_rows import ParquetRecords, RowGroupCache

    cache = RowGroupCache()
    required = {key: getattr(source.columns, key) for key in ("messages", "images", "id")}
    required = {key: name for key, name in required.items() if name}
    return [ParquetRecords(file, record_layout(source), roots, cache, required) for file in files]


def _turn_counts(parts: Iterable[ChatRecords]) -> list[NDArray[np.int64]]:
    return [np.array(part.turn_counts(), dtype=np.int64) for part in parts]


class _Samples(Sequence[_SampleRecord]):
    """The samples of several files: their records, or each turn of them."""

    def __init__(self, parts: Sequence[ChatRecords], turn_counts: Sequence[NDArray[np.int64]] | None) -> None:
        self.parts = parts
        self._turn_ends = None if turn_counts is None else [np.cumsum(counts) for counts in turn_counts]
        sizes = [len(part) for part in parts]
        if self._turn_ends is not None:
            sizes = [int(ends[-1]) if len(ends) else 0 for ends in self._turn_ends]
        self._file_ends = np.array(list(accumulate(sizes)), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._file_ends[-1]) if len(self._file_ends) else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        file = int(np.searchsorted(self._file_ends, index, side="right"))
        offset = index - (int(self._file_ends[file - 1]) if file else 0)
        if self._turn_ends is None:
            return _SampleRecord(file, offset, None)
        ends = self._turn_ends[file]
        record = int(np.searchsorted(ends, offset, side="right"))
        return _SampleRecord(file, record, offset - (int(ends[record - 1]) if record else 0))

    def locate(self, index: int) -> str:
        """Return the file and the line, entry or row of a sample."""
        sample = self[index]
        return self.parts[sample.file].locate(sample.record)

    def group_counts(self) -> NDArray[np.int64]:
        """Return the number of samples of every row group of all files."""
        counts: list[NDArray[np.int64]] = []
        for file, part in enumerate(self.parts):
            ends = np.cumsum(part.counts)
            if self._turn_ends is not None:
                ends = np.concatenate(([0], self._turn_ends[file]))[ends]
            counts.append(np.diff(ends, prepend=0))
        return np.concatenate(counts) if counts else np.zeros(0, dtype=np.int64)


def _read(
    parts: Sequence[ChatRecords], build: Callable[[FileRecord, int | None], Conversation], sample: _SampleRecord
) -> Conversation:
    return build(parts[sample.file].read(sample.record), sample.turn)


def _read_text(samples: _Samples, build: Callable[[FileRecord, int | None], Conversation], index: int) -> Conversation:
    sample = samples[index]
    return build(samples.parts[sample.file].read_text(sample.record), sample.turn)


def _conversation(
    name: str, roots: Sequence[Path], several_files: bool, record: FileRecord, turn: int | None
) -> Conversation:
    """Return the sample of a record. Keys are ``name/chat/id.line``: ids may repeat, or be absent."""
    parts = [record.chat.name, record.file.stem if several_files else "", str(record.number)]
    key = f"{name}/chat/" + ".".join(part.replace("/", "_").replace(" ", "_") for part in parts if part)
    if turn is not None:
        key += f".{turn}"
    try:
        return conversation(record.chat, key, roots, turn)
    except ValueError as error:
        raise DataError(f"{record.file}, {record.location}, sample {key}: {error_reason(error)}") from error
