"""The fine-tuning datasets, each read from its original annotation files and folder layout.

A source is a function (data root, split "train" or "val") -> Sequence[Conversation]. Keys are
``source/task/id``; ``task_of`` gives the part that accuracies are grouped by. ``Turn.response`` is the gold answer.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from aki_megatron.data.sources import aokvqa, refcoco, vqav2, vsr
from aki_megatron.flow import ConfigError, Conversation, DataError

SPLITS = ("train", "val")

SOURCES: dict[str, Callable[[Path, str], Sequence[Conversation]]] = {
    "vqav2": vqav2.read,
    "vsr": vsr.read,
    "aokvqa": aokvqa.read,
    "refcoco": refcoco.read,
}

FILES: dict[str, Mapping[str, tuple[str, ...]]] = {
    "vqav2": vqav2.FILES,
    "vsr": vsr.FILES,
    "aokvqa": aokvqa.FILES,
    "refcoco": refcoco.FILES,
}
"""Source -> split -> annotation files and image folders under the data root."""


def task_of(key: str) -> str:
    """``vqav2/count/123`` -> ``vqav2/count``: the group in which a sample's accuracy is reported."""
    return key.rpartition("/")[0]


def missing_files(root: Path, names: Iterable[str], split: str) -> list[str]:
    """Every file or folder that the sources need and the root lacks, with the source that needs it."""
    wanted = {(file, name) for name in names for file in FILES[name][split]}
    return [f"{root / file} ({name})" for file, name in sorted(wanted) if not (root / file).exists()]


def open_sources(root: Path, names: Sequence[str], split: str) -> dict[str, Sequence[Conversation]]:
    """Read the named sources. One DataError lists everything that is missing, before anything is read."""
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ConfigError(f"Unknown data.sources {unknown}; known are {sorted(SOURCES)}.")
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}; a source has {SPLITS}.")
    if not root.is_dir():
        raise DataError(f"The data root {root} (data.root) does not exist; it would hold the sources {list(names)}.")
    missing = missing_files(root, names, split)
    if missing:
        listing = "\n  ".join(missing)
        raise DataError(f"Under the data root {root} (data.root) these are missing for split {split!r}:\n  {listing}")
    opened = {name: SOURCES[name](root, split) for name in names}
    empty = [name for name, rows in opened.items() if not rows]
    if empty:
        raise DataError(f"The sources {empty} under {root} have no sample in split {split!r}.")
    return opened
