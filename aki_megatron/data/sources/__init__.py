"""Read the fine-tuning datasets from their original annotation files and folder layouts.

config/datasets.py registers a DatasetReader for each. Keys of samples are ``dataset/task/id``; ``task_of`` returns the
part that accuracies are grouped by. ``Turn.response`` is the reference answer.

A split is the one of the dataset's own release. Visual Genome and LLaVA-150k were released without splits: they have
"train" only, nothing of them is set aside as "val", and ``with_split`` leaves them out where a "val" is needed.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from aki_megatron.config.datasets import DATASETS, DRAWN_DATASETS
from aki_megatron.data.bad_samples import num_tolerated
from aki_megatron.data.sources.records import DatasetReader, LazyConversations
from aki_megatron.errors import ConfigError, DataError

SPLITS = ("train", "val")

_READERS = DATASETS | DRAWN_DATASETS


@cache
def dataset_reader(name: str) -> DatasetReader:
    """Import the reader of a dataset. Raises ConfigError for a name that is not registered."""
    if name not in _READERS:
        raise ConfigError(f"Unknown data.sources {[name]}; known are {sorted(_READERS)}.")
    reader: DatasetReader = resolve_name(f"{__name__}.{_READERS[name]}")
    return reader


def task_of(key: str) -> str:
    """Return the group in which a sample's accuracy is reported: ``vqav2/count/123`` -> ``vqav2/count``."""
    return key.rpartition("/")[0]


def with_split(names: Iterable[str], split: str) -> list[str]:
    """Return the datasets among ``names`` whose release has this split."""
    return [name for name in names if split in dataset_reader(name).files]


def missing_files(root: Path, names: Iterable[str], split: str) -> list[str]:
    """Return every file or folder that the datasets need and the root lacks, with the dataset that needs it.

    Raises ConfigError for a dataset without the split.
    """
    return [
        f"{root / file} ({name})" for file, name in _required_files(root, names, split) if not (root / file).exists()
    ]


def open_sources(
    root: Path,
    names: Sequence[str],
    split: str,
    *,
    multi_turn: Collection[str] = (),
    max_bad_fraction: float = 0.0,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, LazyConversations[Any]]:
    """Read the named datasets. One DataError lists everything that is missing, before anything is read.

    multi_turn        datasets that keep a conversation as one sample of several turns instead of one per turn
    max_bad_fraction  largest fraction of a dataset's records that may be malformed and is left out (8 always may,
                      unless it is 0); more is a DataError
    progress          gets lines that say which records are left out

    Raises ConfigError for unknown names, and for a dataset whose release lacks the split.
    """
    unknown = [name for name in names if name not in _READERS]
    if unknown:
        raise ConfigError(f"Unknown data.sources {unknown}; known are {sorted(_READERS)}.")
    single_turn = sorted(name for name in set(multi_turn) if dataset_reader(name).read_multi_turn is None)
    if single_turn:
        allowed = sorted(name for name in DATASETS if dataset_reader(name).read_multi_turn is not None)
        raise ConfigError(f"{single_turn} have no conversations of several turns; split_turns: false is for {allowed}.")
    if missing := missing_files(root, names, split):
        raise missing_error(root, missing, split)
    opened = {name: _read(root, name, split, multi_turn=name in multi_turn) for name in names}
    for name, samples in opened.items():
        report_faults(name, samples, max_bad_fraction, progress)
    empty = [name for name, samples in opened.items() if not samples]
    if empty:
        listing = "".join(f"\n  {line}" for name in empty for line in opened[name].faults.lines())
        raise DataError(f"The sources {empty} under {root} have no sample in split {split!r}.{listing}")
    return opened


def _read(root: Path, name: str, split: str, *, multi_turn: bool) -> LazyConversations[Any]:
    reader = dataset_reader(name)
    read = reader.read_multi_turn if multi_turn else reader.read
    assert read is not None, name
    return read(root, split)


def missing_error(root: Path, missing: Sequence[str], split: str) -> DataError:
    """Return the error that lists files and folders which do not exist."""
    listing = "\n  ".join(missing)
    problem = f"Under the data root {root} (data.root) these are missing for split {split!r}:"
    if not root.is_dir():
        problem = f"The data root {root} (data.root) does not exist; looked for, for split {split!r}:"
    return DataError(f"{problem}\n  {listing}")


def report_faults(
    name: str, samples: LazyConversations[Any], max_bad_fraction: float, progress: Callable[[str], None]
) -> None:
    """Report the records that are left out. Raises DataError where they are more than are tolerated."""
    if not samples.faults.total:
        return
    if samples.faults.total > num_tolerated(max_bad_fraction, len(samples) + samples.faults.total):
        raise DataError(
            f"{_faults_text(name, samples)}\nThat is more than data.max_bad_fraction={max_bad_fraction} allows. Repair "
            "or remove these records, or raise it."
        )
    progress(_faults_text(name, samples))


def _faults_text(name: str, samples: LazyConversations[Any]) -> str:
    """Return how many records of a dataset are left out, and the first of each kind."""
    faults = samples.faults
    listing = "\n  ".join(faults.lines())
    total = len(samples) + faults.total
    return f"source {name}: {faults.total:,} of {total:,} records cannot be used, the first of each kind:\n  {listing}"


def _required_files(root: Path, names: Iterable[str], split: str) -> list[tuple[str, str]]:
    """Return (file or folder, dataset) of every input of the datasets."""
    names = list(names)
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}; a source has {SPLITS}.")
    without = [name for name in names if split not in dataset_reader(name).files]
    if without:
        raise ConfigError(
            f"The sources {without} have no split {split!r}: they were released without splits, and nothing of them is "
            f"set aside here. Leave them out; {with_split(DATASETS, split)} have it."
        )
    return sorted({(file, name) for name in names for file in dataset_reader(name).files_below(root, split)})
