"""OCR-VQA: questions about book covers, here three rows: letters of the title, a shape, letters of the author.

https://ocr-vqa.github.io: one dataset.json, key -> imageURL, questions, answers, title, authorName, genre and split
(1 train, 2 val, 3 test); pictures OCRVQA/images/{key}{ending of imageURL}.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aki_megatron.synthetic.scene_pools import Drawn
from aki_megatron.synthetic.scenes import CELL_PIXELS, COLORS, GRID, LETTERS, SHAPES, Scene, SceneObject
from aki_megatron.synthetic.writers import write_json

IMAGES = "OCRVQA/images"
SPLITS = {"train": 1, "val": 2, "test": 3}
_HOST = "http://drawn.invalid/images"
_TITLE, _AUTHOR = ("What is the title of this book?",), ("Who wrote this book?", "Who is the author of this book?")
_GENRE = ("What is the genre of this book?", "What type of book is this?")
_RELATED = ("Is this a {genre} book?", "Is this book related to {genre}?")


@dataclass(frozen=True)
class Word:
    """Letters side by side, of one colour; x, y, width, height in pixels."""

    text: str
    box: tuple[int, int, int, int]


def draw_cover(rng: np.random.Generator) -> Scene:
    """A word of two or three letters above, one shape in the middle row, another word below."""
    things: list[SceneObject] = []
    for row in range(GRID):
        color = COLORS[int(rng.integers(len(COLORS)))]
        if row == 1:
            kinds: tuple[str, ...] = (SHAPES[int(rng.integers(len(SHAPES)))],)
        else:
            kinds = tuple(LETTERS[number] for number in rng.integers(len(LETTERS), size=int(rng.integers(2, 4))))
        start = int(rng.integers(GRID - len(kinds) + 1))
        things += [SceneObject(kind, color, row, start + at) for at, kind in enumerate(kinds)]
    return Scene(tuple(things))


def words(scene: Scene) -> list[Word]:
    """What can be read in a scene, row by row: letters of one colour side by side are one word."""
    found: list[list[SceneObject]] = []
    for thing in scene.objects:
        last = found[-1][-1] if found else None
        if thing.kind not in LETTERS:
            continue
        if last and (last.row, last.column + 1, last.color) == (thing.row, thing.column, thing.color):
            found[-1].append(thing)
        else:
            found.append([thing])
    return [
        Word("".join(thing.kind for thing in run), (*run[0].cell_box[:2], CELL_PIXELS * len(run), CELL_PIXELS))
        for run in found
    ]


def write(root: Path, drawn: Iterable[Drawn]) -> dict[str, int]:
    """Write dataset.json and the pictures under ``root``; returns the number of questions per split."""
    books: dict[str, Any] = {}
    counts = dict.fromkeys((f"{split}/ocrvqa" for split in SPLITS), 0)
    for one in drawn:
        key = isbn(SPLITS[one.split] * 10_000_000 + one.number)
        (root / IMAGES / f"{key}.{one.extension}").write_bytes(one.picture(one.extension))
        books[key] = book(one.scene, one.words, f"{_HOST}/{key}.{one.extension}", SPLITS[one.split])
        counts[f"{one.split}/ocrvqa"] += len(books[key]["questions"])
    write_json(root / "OCRVQA/dataset.json", books)
    return counts


def book(scene: Scene, rng: random.Random, url: str, split: int) -> dict[str, Any]:
    """One entry: five questions about a cover, two of them answered by Yes and No."""
    title, author = (word.text for word in words(scene))
    (genre,) = (thing.kind for thing in scene.objects if thing.kind in SHAPES)
    other = rng.choice([shape for shape in SHAPES if shape != genre])
    asked = [
        (rng.choice(_AUTHOR), author),
        (rng.choice(_TITLE), title),
        (rng.choice(_GENRE), genre),
        (rng.choice(_RELATED).format(genre=genre), "Yes"),
        (rng.choice(_RELATED).format(genre=other), "No"),
    ]
    return {
        "imageURL": url,
        "questions": [question for question, _ in asked],
        "answers": [answer for _, answer in asked],
        "title": title,
        "authorName": author,
        "genre": genre,
        "split": split,
    }


def isbn(number: int) -> str:
    """An ISBN-10 whose first nine digits are ``number``: OCR-VQA's keys are such, with an X now and then."""
    digits = f"{number:09}"
    check = -sum((10 - at) * int(digit) for at, digit in enumerate(digits)) % 11
    return digits + ("X" if check == 10 else str(check))
