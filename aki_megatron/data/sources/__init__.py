"""Read the fine-tuning datasets from their original annotation files and folder layouts.

config/datasets.py registers a DatasetReader for each. Keys of samples are ``dataset/task/id``; ``task_of`` returns the
part that accuracies are grouped by. ``Turn.response`` is the reference answer.

A split is the one of the dataset's own release. Visual Genome and LLaVA-150k were released without splits: they have
"train" only, nothing of them is set aside as "val", and ``with_split`` leaves them out where a "val" is needed.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from pathlib import Path
from pkgutil import resolve_name

from aki_megatron.config.datasets import DATASETS
from aki_megatron.data.sources.records import DatasetReader
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.types import Conversation

SPLITS = ("train", "val")


@cache
def dataset_reader(name: str) -> DatasetReader:
    """Import the reader of a dataset. Raises ConfigError for a name that is not registered."""
    if name not in DATASETS:
        raise ConfigError(f"Unknown data.sources {[name]}; known are {sorted(DATASETS)}.")
    reader: DatasetReader = resolve_name(f"{__name__}.{DATASETS[name]}")
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
    return [f"{root / file} ({name})" for file, name in _required_files(names, split) if not (root / file).exists()]


def open_sources(
    root: Path, names: Sequence[str], split: str, *, multi_turn: Collection[str] = ()
) -> dict[str, Sequence[Conversation]]:
    """Read the named datasets. One DataError lists everything that is missing, before anything is read.

    Those in ``multi_turn`` keep a conversation as one sample of several turns instead of one per turn.
    Raises ConfigError for unknown names, and for a dataset whose release lacks the split.
    """
    unknown = [name for name in names if name not in DATASETS]
    if unknown:
        raise ConfigError(f"Unknown data.sources {unknown}; known are {sorted(DATASETS)}.")
    single_turn = sorted(name for name in set(multi_turn) if dataset_reader(name).read_multi_turn is None)
    if single_turn:
        allowed = sorted(name for name in DATASETS if dataset_reader(name).read_multi_turn is not None)
        raise ConfigError(f"{single_turn} have no conversations of several turns; split_turns: false is for {allowed}.")
    missing = missing_files(root, names, split)
    if missing:
        listing = "\n  ".join(missing)
        problem = f"Under the data root {root} (data.root) these are missing for split {split!r}:"
        if not root.is_dir():
            problem = f"The data root {root} (data.root) does not exist; looked for, for split {split!r}:"
        raise DataError(f"{problem}\n  {listing}")
    opened = {name: _read(root, name, split, multi_turn=name in multi_turn) for name in names}
    empty = [name for name, samples in opened.items() if not samples]
    if empty:
        raise DataError(f"The sources {empty} under {root} have no sample in split {split!r}.")
    return opened


def _read(root: Path, name: str, split: str, *, multi_turn: bool) -> Sequence[Conversation]:
    reader = dataset_reader(name)
    read = reader.read_multi_turn if multi_turn else reader.read
    assert read is not None, name
    return read(root, split)


def _required_files(names: Iterable[str], split: str) -> list[tuple[str, str]]:
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
    return sorted({(file, name) for name in names for file in dataset_reader(name).files[split]})
