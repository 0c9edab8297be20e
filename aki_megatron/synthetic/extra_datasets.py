"""The datasets beside the captions and the first four: which scenes each is about, and which format it is written in.

They use random streams of their own or show images that exist already, and are written after the first four, so that a
change here leaves the captions, the first four datasets and the tokenizer as they are, to the byte.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aki_megatron.synthetic.book_covers import sample_cover, sample_page
from aki_megatron.synthetic.formats import blip3_ocr, gqa, llava150k, ocrvqa, refcoco, scienceqa, visualgenome
from aki_megatron.synthetic.scene_pools import (
    SyntheticExample,
    is_in_coco_2017,
    own_scenes,
    pool_size,
    shared_scenes,
)

IMAGE_FOLDERS = (gqa.IMAGES, ocrvqa.IMAGES, visualgenome.IMAGES, *scienceqa.IMAGES)
"""Folders with images of the extra datasets."""


@dataclass(frozen=True)
class ExtraDataset:
    """Splits, whose scenes it takes (seed, name, split, count), and its writer, which returns counts by split/name."""

    splits: tuple[str, ...]
    scenes: Callable[[int, str, str, int], Iterator[SyntheticExample]]
    write: Callable[[Path, Iterable[SyntheticExample]], dict[str, int]]


def _covers(seed: int, name: str, split: str, count: int) -> Iterator[SyntheticExample]:
    return own_scenes(seed, name, split, count, sample_cover)


def _pages(seed: int, name: str, split: str, count: int) -> Iterator[SyntheticExample]:
    return own_scenes(seed, name, split, count, sample_page)


def _coco_2017(seed: int, name: str, split: str, count: int) -> Iterator[SyntheticExample]:
    return shared_scenes(seed, name, split, count, is_in_coco_2017)


EXTRA_DATASETS = {
    "gqa": ExtraDataset(("train", "val"), own_scenes, gqa.write),
    "ocrvqa": ExtraDataset(("train", "val", "test"), _covers, ocrvqa.write),
    "scienceqa": ExtraDataset(("train", "val", "test"), own_scenes, scienceqa.write),
    "refcoco+": ExtraDataset(("train", "val"), shared_scenes, refcoco.write_refcoco_plus),
    "refcocog": ExtraDataset(("train", "val"), shared_scenes, refcoco.write_refcocog),
    "vg": ExtraDataset(("train",), own_scenes, visualgenome.write),
    "llava": ExtraDataset(("train",), _coco_2017, llava150k.write),
    "ocr": ExtraDataset(("train", "val"), _pages, blip3_ocr.write),
}
"""Datasets by name, also that of their random streams. Visual Genome and LLaVA have no split, as in the originals."""


def num_extra_scenes(train_scenes: int, val_scenes: int) -> int:
    """Return how many scenes the extra datasets are about in total, those that LLaVA skips included."""
    return sum(
        pool_size(split, train_scenes, val_scenes) for dataset in EXTRA_DATASETS.values() for split in dataset.splits
    )


def write_extra_datasets(
    root: Path, seed: int, train_scenes: int, val_scenes: int, progress: Callable[[int], None]
) -> dict[str, int]:
    """Write every extra dataset under ``root``; return the number of samples by ``split/name``.

    ``progress`` is called with the number of scenes done so far, in the end num_extra_scenes.
    """
    for folder in IMAGE_FOLDERS:
        (root / folder).mkdir(parents=True)
    counts: dict[str, int] = {}
    done = 0
    for name, dataset in EXTRA_DATASETS.items():
        sizes = {split: pool_size(split, train_scenes, val_scenes) for split in dataset.splits}
        counts |= dataset.write(root, _examples(dataset, seed, name, sizes, done, progress))
        done += sum(sizes.values())
        progress(done)
    return counts


def _examples(
    dataset: ExtraDataset, seed: int, name: str, sizes: dict[str, int], done: int, progress: Callable[[int], None]
) -> Iterator[SyntheticExample]:
    """Yield the scenes of all splits and report ``done`` + the number of scenes after each."""
    for split, size in sizes.items():
        for example in dataset.scenes(seed, name, split, size):
            yield example
            progress(done + example.index + 1)
        done += size
