"""BLIP3-OCR-200M: webdataset tars whose txt is a JSON list of twelve captions of what can be read in a picture.

https://huggingface.co/datasets/Salesforce/blip3-ocr-200m: six granularities (0 the words, 1 roughly where, 2 as
fractions, 3 and 4 corners, coarse and fine, 5 in tags), then the same six behind the picture's raw caption.
"""

import json
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

from aki_megatron.synthetic.book_covers import Word, draw_cover, words
from aki_megatron.synthetic.scene_pools import Drawn, described
from aki_megatron.synthetic.scenes import CELL_PIXELS, IMAGE_PIXELS, SHAPES, Scene, draw_scene
from aki_megatron.synthetic.writers import write_tar

FOLDERS = {"train": "ocr", "val": "ocr_val"}
GRANULARITIES = 6
_PER_SHARD = 250
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def draw_page(rng: np.random.Generator) -> Scene:
    """A picture with something to read: a cover, or a scene that has a letter."""
    if rng.random() < 0.5:
        return draw_cover(rng)
    while not words(scene := draw_scene(rng)):
        pass
    return scene


def write(root: Path, drawn: Iterable[Drawn]) -> dict[str, int]:
    """Write the tars of both splits; returns the number of samples per split."""
    samples: dict[str, list[tuple[str, str, bytes, str]]] = {split: [] for split in FOLDERS}
    for one in drawn:
        shard, place = divmod(one.number, _PER_SHARD)
        key = f"{shard:05}{place:04}"  # as img2dataset counts
        samples[one.split].append((key, "jpg", one.picture("jpg"), json.dumps(captions(one.scene))))
    for split, found in samples.items():
        for start in range(0, len(found), _PER_SHARD):
            write_tar(root / FOLDERS[split] / f"{start // _PER_SHARD:05}.tar", found[start : start + _PER_SHARD])
    return {f"{split}/ocr": len(found) for split, found in samples.items()}


def captions(scene: Scene) -> list[dict[str, object]]:
    """The twelve captions of a scene, in the order of the dataset."""
    shapes = [thing for thing in scene.objects if thing.kind in SHAPES]
    raw = f"drawing with {' and '.join(f'a {described(thing)}' for thing in shapes) or 'letters only'}"
    found: list[dict[str, object]] = []
    for with_raw in (False, True):
        for granularity in range(GRANULARITIES):
            said = f"The image contains {', '.join(_phrase(word, granularity) for word in words(scene))}"
            text = f"{raw}. {said}" if with_raw else said
            found.append({"text": text, "granularity": granularity, "include_datacomp_raw_cap": with_raw})
    return found


def _phrase(word: Word, granularity: int) -> str:
    x, y, width, height = word.box
    middle_x, middle_y = Fraction(2 * x + width, 2 * IMAGE_PIXELS), Fraction(2 * y + height, 2 * IMAGE_PIXELS)
    digits = 1 if granularity == 3 else 3
    corners = (x, y), (x + width, y + height)
    first, last = (f"[{at / IMAGE_PIXELS:.{digits}f}, {down / IMAGE_PIXELS:.{digits}f}]" for at, down in corners)
    fractions = f"{middle_y} of the image from top to bottom and {middle_x} of the image from left to right"
    return (
        f'the text "{word.text}"',
        f'the text "{word.text}" located at the {_corner(word)}',
        f'the text "{word.text}" located at {fractions}',
        f'the text "{word.text}" approximately starts at {first} and extends upto {last}',
        f'the text "{word.text}" starts at {first} and extends upto {last}',
        f'the text <ocr>"{word.text}"</ocr><bbox>{first}{last}</bbox>',
    )[granularity]


def _corner(word: Word) -> str:
    """``top left corner``, ``top``, ``center``, after the middle of the word."""
    x, y, width, _ = word.box
    row, column = _ROWS[y // CELL_PIXELS], _COLUMNS[(2 * x + width - 1) // 2 // CELL_PIXELS]
    if row and column:
        return f"{row} {column} corner"
    return row or column or "center"
