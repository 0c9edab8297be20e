"""Scenes with something to read: book covers, a word of letters above and below a shape, and the words of any scene."""

from dataclasses import dataclass

import numpy as np

from aki_megatron.synthetic.scenes import (
    CELL_PIXELS,
    COLORS,
    GRID_SIZE,
    LETTERS,
    SHAPES,
    Scene,
    SceneObject,
    sample_scene,
)


@dataclass(frozen=True)
class Word:
    """Adjacent letters of one colour; x, y, width, height in pixels."""

    text: str
    box: tuple[int, int, int, int]


def sample_cover(rng: np.random.Generator) -> Scene:
    """Sample a word of two or three letters in the top row, a shape in the middle row, another word below."""
    objects: list[SceneObject] = []
    for row in range(GRID_SIZE):
        color = COLORS[int(rng.integers(len(COLORS)))]
        if row == 1:
            kinds: tuple[str, ...] = (SHAPES[int(rng.integers(len(SHAPES)))],)
        else:
            kinds = tuple(LETTERS[number] for number in rng.integers(len(LETTERS), size=int(rng.integers(2, 4))))
        start = int(rng.integers(GRID_SIZE - len(kinds) + 1))
        objects += [SceneObject(kind, color, row, start + offset) for offset, kind in enumerate(kinds)]
    return Scene(tuple(objects))


def sample_page(rng: np.random.Generator) -> Scene:
    """Sample a scene with something to read: a cover, or a scene that has a letter."""
    if rng.random() < 0.5:
        return sample_cover(rng)
    while not words_of(scene := sample_scene(rng)):
        pass
    return scene


def words_of(scene: Scene) -> list[Word]:
    """Return what can be read in a scene, row by row: adjacent letters of one colour are one word."""
    runs: list[list[SceneObject]] = []
    for item in scene.objects:
        last = runs[-1][-1] if runs else None
        if item.kind not in LETTERS:
            continue
        if last and (last.row, last.column + 1, last.color) == (item.row, item.column, item.color):
            runs[-1].append(item)
        else:
            runs.append([item])
    return [
        Word("".join(item.kind for item in run), (*run[0].cell_box[:2], CELL_PIXELS * len(run), CELL_PIXELS))
        for run in runs
    ]
