"""The fine-tuning datasets, each read from its original annotation files and folder layout.

A source is a function (data root, split "train" or "val") -> Sequence[Conversation]. Keys are
``source/task/id``; ``task_of`` gives the part that accuracies are grouped by. ``Turn.response`` is the gold answer.

A split is the one of the dataset's own release. Visual Genome and LLaVA-150k were released whole: they have
"train" only, no share is held out in their name, and ``with_split`` leaves them out where a "val" is wanted.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from aki_megatron.data.sources import (
    aokvqa,
    gqa,
    llava150k,
    ocrvqa,
    refcoco,
    scienceqa,
    visualgenome,
    vqav2,
    vsr,
)
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.types import Conversation

SPLITS = ("train", "val")

SOURCES: dict[str, Callable[[Path, str], Sequence[Conversation]]] = {
    "vqav2": vqav2.read,
    "gqa": gqa.read,
    "vsr": vsr.read,
    "ocrvqa": ocrvqa.read,
    "aokvqa": aokvqa.read,
    "scienceqa": scienceqa.read,
    "refcoco": refcoco.read,
    "refcoco+": partial(refcoco.read, variant="refcoco+"),
    "refcocog": partial(refcoco.read, variant="refcocog"),
    "visualgenome": visualgenome.read,
    "llava150k": llava150k.read,
}

WHOLE: dict[str, Callable[[Path, str], Sequence[Conversation]]] = {"llava150k": partial(llava150k.read, whole=True)}
"""Sources of dialogues, read so that a dialogue stays one sample."""

FILES: dict[str, Mapping[str, tuple[str, ...]]] = {
    "vqav2": vqav2.FILES,
    "gqa": gqa.FILES,
    "vsr": vsr.FILES,
    "ocrvqa": ocrvqa.FILES,
    "aokvqa": aokvqa.FILES,
    "scienceqa": scienceqa.FILES,
    **{variant: refcoco.files(variant) for variant in refcoco.VARIANTS},
    "visualgenome": visualgenome.FILES,
    "llava150k": llava150k.FILES,
}
"""Source -> split -> annotation files and image folders under the data root. A split that is not there, is not."""


def task_of(key: str) -> str:
    """``vqav2/count/123`` -> ``vqav2/count``: the group in which a sample's accuracy is reported."""
    return key.rpartition("/")[0]


def with_split(names: Iterable[str], split: str) -> list[str]:
    """The sources among ``names`` whose release has this split."""
    return [name for name in names if split in FILES[name]]


def missing_files(root: Path, names: Iterable[str], split: str) -> list[str]:
    """Every file or folder that the sources need and the root lacks, with the source that needs it.

    Raises ConfigError for a source without the split.
    """
    return [f"{root / file} ({name})" for file, name in _wanted(names, split) if not (root / file).exists()]


def open_sources(
    root: Path, names: Sequence[str], split: str, *, whole_dialogues: Collection[str] = ()
) -> dict[str, Sequence[Conversation]]:
    """Read the named sources. One DataError lists everything that is missing, before anything is read.

    Sources in ``whole_dialogues`` keep a dialogue as one sample instead of one per exchange.
    Raises ConfigError for unknown names, and for a source whose release lacks the split.
    """
    unknown = [name for name in names if name not in SOURCES]
    if unknown:
        raise ConfigError(f"Unknown data.sources {unknown}; known are {sorted(SOURCES)}.")
    other = sorted(set(whole_dialogues) - set(WHOLE))
    if other:
        raise ConfigError(f"{other} are no dialogues; whole dialogues are to be had of {sorted(WHOLE)}.")
    missing = missing_files(root, names, split)
    if missing:
        listing = "\n  ".join(missing)
        trouble = f"Under the data root {root} (data.root) these are missing for split {split!r}:"
        if not root.is_dir():
            trouble = f"The data root {root} (data.root) does not exist; looked for, for split {split!r}:"
        raise DataError(f"{trouble}\n  {listing}")
    opened = {name: (WHOLE if name in whole_dialogues else SOURCES)[name](root, split) for name in names}
    empty = [name for name, rows in opened.items() if not rows]
    if empty:
        raise DataError(f"The sources {empty} under {root} have no sample in split {split!r}.")
    return opened


def _wanted(names: Iterable[str], split: str) -> list[tuple[str, str]]:
    """(file or folder, source) of every input of the sources."""
    names = list(names)
    if split not in SPLITS:
        raise ConfigError(f"Unknown split {split!r}; a source has {SPLITS}.")
    without = [name for name in names if split not in FILES[name]]
    if without:
        raise ConfigError(
            f"The sources {without} have no split {split!r}: they were released whole, and no share is held out here. "
            f"Leave them out; {with_split(FILES, split)} have it."
        )
    return sorted({(file, name) for name in names for file in FILES[name][split]})
