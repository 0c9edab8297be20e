"""The sets beside the captions and the first four: which scenes each asks about, and who writes it.

They draw from streams of their own or show pictures that are there already, and come after the first sets, so that a
change here leaves the captions, the first four sets and the tokenizer as they are, to the byte.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aki_megatron.synthetic import book_covers, dialogues, gqa, ocr_captions, referring, science
from aki_megatron.synthetic.scene_pools import Drawn, own_scenes, pool_size, serves_2017, shared_scenes

PICTURES = (
    *(gqa.IMAGES, book_covers.IMAGES, referring.IMAGES),
    *(f"ScienceQA/images/{split}" for split in science.SPLITS),
)
"""Folders with pictures of the added sets."""


@dataclass(frozen=True)
class _Set:
    """A set: its splits, whose scenes it takes, and its writer, which returns counts by ``split/name``."""

    splits: tuple[str, ...]
    scenes: Callable[[int, str, str, int], Iterator[Drawn]]
    write: Callable[[Path, Iterable[Drawn]], dict[str, int]]


def _covers(seed: int, name: str, split: str, count: int) -> Iterator[Drawn]:
    return own_scenes(seed, name, split, count, book_covers.draw_cover)


def _pages(seed: int, name: str, split: str, count: int) -> Iterator[Drawn]:
    return own_scenes(seed, name, split, count, ocr_captions.draw_page)


def _of_2017(seed: int, name: str, split: str, count: int) -> Iterator[Drawn]:
    return shared_scenes(seed, name, split, count, serves_2017)


SETS = {
    "gqa": _Set(("train", "val"), own_scenes, gqa.write),
    "ocrvqa": _Set(("train", "val", "test"), _covers, book_covers.write),
    "scienceqa": _Set(("train", "val", "test"), own_scenes, science.write),
    "refcoco+": _Set(("train", "val"), shared_scenes, referring.write_refcoco_plus),
    "refcocog": _Set(("train", "val"), shared_scenes, referring.write_refcocog),
    "vg": _Set(("train",), own_scenes, referring.write_genome),
    "llava": _Set(("train",), _of_2017, dialogues.write),
    "ocr": _Set(("train", "val"), _pages, ocr_captions.write),
}
"""Name, also of the random streams -> how a set is made. Visual Genome and LLaVA have no split, as in the originals."""


def scenes_of_additions(scenes: int, held_out: int) -> int:
    """How many scenes the added sets ask about, all together; LLaVA passes over those without a picture of its own."""
    return sum(pool_size(split, scenes, held_out) for one in SETS.values() for split in one.splits)


def write_additions(
    root: Path, seed: int, scenes: int, held_out: int, progress: Callable[[int], None]
) -> dict[str, int]:
    """Draw and write every added set under ``root``; returns the number of samples per ``split/name``.

    ``progress`` is called with the number of scenes done so far, at last with scenes_of_additions.
    """
    for folder in PICTURES:
        (root / folder).mkdir(parents=True)
    counts: dict[str, int] = {}
    done = 0
    for name, one in SETS.items():

        def drawn(name: str = name, one: _Set = one, before: int = done) -> Iterator[Drawn]:
            for split in one.splits:
                size = pool_size(split, scenes, held_out)
                for scene in one.scenes(seed, name, split, size):
                    yield scene
                    progress(before + scene.number + 1)
                before += size

        counts |= one.write(root, drawn())
        done += sum(pool_size(split, scenes, held_out) for split in one.splits)
        progress(done)
    return counts
