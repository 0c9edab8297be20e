"""BLIP3-OCR-200M (https://huggingface.co/datasets/Salesforce/blip3-ocr-200m): captions of the text in an image.

Webdataset tars whose txt member is a JSON list of twelve captions: six granularities (0 the words, 1 the rough
location, 2 fractions of the image, 3 and 4 corners, coarse and fine, 5 tags), then the same six after a raw caption.
"""

import json
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

from aki_megatron.synthetic.book_covers import Word, words_of
from aki_megatron.synthetic.files import write_tar
from aki_megatron.synthetic.scene_pools import SyntheticExample
from aki_megatron.synthetic.scenes import CELL_PIXELS, IMAGE_PIXELS, SHAPES, Scene

FOLDERS = {"train": "ocr", "val": "ocr_val"}
NUM_GRANULARITIES = 6
_SAMPLES_PER_SHARD = 250
_ROWS, _COLUMNS = ("top", "", "bottom"), ("left", "", "right")


def write(root: Path, examples: Iterable[SyntheticExample]) -> dict[str, int]:
    """Write the tars of both splits; return the number of samples by ``split/ocr``."""
    samples: dict[str, list[tuple[str, str, bytes, str]]] = {split: [] for split in FOLDERS}
    for example in examples:
        shard, index = divmod(example.index, _SAMPLES_PER_SHARD)
        key = f"{shard:05}{index:04}"  # as img2dataset numbers
        text = json.dumps(ocr_captions(example.scene))
        samples[example.split].append((key, "jpg", example.encode_image("jpg"), text))
    for split, of_split in samples.items():
        for start in range(0, len(of_split), _SAMPLES_PER_SHARD):
            shard = start // _SAMPLES_PER_SHARD
            write_tar(root / FOLDERS[split] / f"{shard:05}.tar", of_split[start : start + _SAMPLES_PER_SHARD])
    return {f"{split}/ocr": len(of_split) for split, of_split in samples.items()}


def ocr_captions(scene: Scene) -> list[dict[str, object]]:
    """Return the twelve captions of a scene, in the order of the dataset."""
    shapes = [item for item in scene.objects if item.kind in SHAPES]
    raw_caption = f"drawing with {' and '.join(f'a {item.phrase}' for item in shapes) or 'letters only'}"
    captions: list[dict[str, object]] = []
    for with_raw in (False, True):
        for granularity in range(NUM_GRANULARITIES):
            text = f"The image contains {', '.join(_word_phrase(word, granularity) for word in words_of(scene))}"
            text = f"{raw_caption}. {text}" if with_raw else text
            captions.append({"text": text, "granularity": granularity, "include_datacomp_raw_cap": with_raw})
    return captions


def _word_phrase(word: Word, granularity: int) -> str:
    x, y, width, height = word.box
    middle_x, middle_y = Fraction(2 * x + width, 2 * IMAGE_PIXELS), Fraction(2 * y + height, 2 * IMAGE_PIXELS)
    digits = 1 if granularity == 3 else 3
    corners = (x, y), (x + width, y + height)
    first, last = (f"[{right / IMAGE_PIXELS:.{digits}f}, {down / IMAGE_PIXELS:.{digits}f}]" for right, down in corners)
    fractions = f"{middle_y} of the image from top to bottom and {middle_x} of the image from left to right"
    return (
        f'the text "{word.text}"',
        f'the text "{word.text}" located at the {_location(word)}',
        f'the text "{word.text}" located at {fractions}',
        f'the text "{word.text}" approximately starts at {first} and extends upto {last}',
        f'the text "{word.text}" starts at {first} and extends upto {last}',
        f'the text <ocr>"{word.text}"</ocr><bbox>{first}{last}</bbox>',
    )[granularity]


def _location(word: Word) -> str:
    """Return ``top left corner``, ``top``, ``center``, ..., by the middle of the word."""
    x, y, width, _ = word.box
    row, column = _ROWS[y // CELL_PIXELS], _COLUMNS[(2 * x + width - 1) // 2 // CELL_PIXELS]
    if row and column:
        return f"{row} {column} corner"
    return row or column or "center"
