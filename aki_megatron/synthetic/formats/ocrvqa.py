"""OCR-VQA (https://ocr-vqa.github.io): questions about book covers.

One dataset.json, key -> imageURL, questions, answers, title, authorName, genre and split (1 train, 2 val, 3 test);
images OCRVQA/images/{key}{extension of imageURL}. The covers have three rows: letters of the title, a shape as the
genre, letters of the author.
"""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aki_megatron.synthetic.book_covers import words_of
from aki_megatron.synthetic.files import IMAGE_HOST, write_json
from aki_megatron.synthetic.scene_pools import SyntheticExample
from aki_megatron.synthetic.scenes import SHAPES, Scene

IMAGES = "OCRVQA/images"
SPLITS = {"train": 1, "val": 2, "test": 3}
_TITLE, _AUTHOR = ("What is the title of this book?",), ("Who wrote this book?", "Who is the author of this book?")
_GENRE = ("What is the genre of this book?", "What type of book is this?")
_RELATED = ("Is this a {genre} book?", "Is this book related to {genre}?")


def write(root: Path, examples: Iterable[SyntheticExample]) -> dict[str, int]:
    """Write dataset.json and the images; return the number of questions by ``split/ocrvqa``."""
    books: dict[str, Any] = {}
    counts = dict.fromkeys((f"{split}/ocrvqa" for split in SPLITS), 0)
    for example in examples:
        key = isbn10(SPLITS[example.split] * 10_000_000 + example.index)
        file_name = f"{key}.{example.extension}"
        (root / IMAGES / file_name).write_bytes(example.encode_image(example.extension))
        url = f"{IMAGE_HOST}/images/{file_name}"
        books[key] = book_entry(example.scene, example.text_rng, url, SPLITS[example.split])
        counts[f"{example.split}/ocrvqa"] += len(books[key]["questions"])
    write_json(root / "OCRVQA/dataset.json", books)
    return counts


def book_entry(scene: Scene, rng: random.Random, url: str, split: int) -> dict[str, Any]:
    """Return one entry: five questions about a cover, two of them answered by Yes and No."""
    title, author = (word.text for word in words_of(scene))
    (genre,) = (item.kind for item in scene.objects if item.kind in SHAPES)
    other_genre = rng.choice([shape for shape in SHAPES if shape != genre])
    pairs = [
        (rng.choice(_AUTHOR), author),
        (rng.choice(_TITLE), title),
        (rng.choice(_GENRE), genre),
        (rng.choice(_RELATED).format(genre=genre), "Yes"),
        (rng.choice(_RELATED).format(genre=other_genre), "No"),
    ]
    return {
        "imageURL": url,
        "questions": [question for question, _ in pairs],
        "answers": [answer for _, answer in pairs],
        "title": title,
        "authorName": author,
        "genre": genre,
        "split": split,
    }


def isbn10(number: int) -> str:
    """Return the ISBN-10 whose first nine digits are ``number``; OCR-VQA's keys are ISBNs, some with a final X."""
    digits = f"{number:09}"
    check = -sum((10 - index) * int(digit) for index, digit in enumerate(digits)) % 11
    return digits + ("X" if check == 10 else str(check))
