"""Scenes of coloured shapes and letters on a 3x3 grid, and their images.

A scene is a pure function of (seed, stream, index): scene 7 does not need scenes 0 to 6, and a larger pool begins with
the same scenes as a smaller one. Rules: three to six objects; a kind is one of four shapes or, with probability 0.3,
one of four letters; no two objects of a scene have the same kind and colour.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

GRID_SIZE = 3
"""Rows and columns of a scene."""
CELL_PIXELS = 12
IMAGE_PIXELS = GRID_SIZE * CELL_PIXELS

COLORS = ("red", "green", "blue", "yellow", "cyan")
SHAPES = ("circle", "square", "triangle", "cross")
LETTERS = ("a", "b", "c", "d")
KINDS = SHAPES + LETTERS
CELL_NAMES = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
"""Names of the cells in raster order."""

LETTER_PROBABILITY = 0.3
MIN_OBJECTS, MAX_OBJECTS = 3, 6

_RGB = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (235, 220, 40),
    "cyan": (50, 220, 220),
}
_GLYPH_PIXELS = 10
_FONT = {  # five pixels wide, seven high
    "a": "01110 10001 10001 11111 10001 10001 10001",
    "b": "11110 10001 11110 10001 10001 10001 11110",
    "c": "01111 10000 10000 10000 10000 10000 01111",
    "d": "11110 10001 10001 10001 10001 10001 11110",
}
_STREAMS = (
    "train",
    "val",
    "tokenizer",
    *(f"{name}/{split}" for name in ("gqa", "ocrvqa", "scienceqa", "vg", "ocr") for split in ("train", "val", "test")),
)
"""Names of the random streams. Only ever append: the index of a name is part of the seed."""

Pixels = NDArray[np.uint8]
"""An image, uint8 [IMAGE_PIXELS, IMAGE_PIXELS, 3], RGB."""


@dataclass(frozen=True)
class SceneObject:
    """A coloured shape or letter in a cell."""

    kind: str
    color: str
    row: int
    column: int

    @property
    def name(self) -> str:
        """Colour and kind, unique in a scene: ``red circle``, ``blue a``."""
        return f"{self.color} {self.kind}"

    @property
    def kind_phrase(self) -> str:
        """The kind in words that cannot be mistaken for an article: ``circle``, ``letter a``."""
        return f"letter {self.kind}" if self.kind in LETTERS else self.kind

    @property
    def phrase(self) -> str:
        """Colour and kind, unique in a scene, without a word that could be an article: ``blue letter a``."""
        return f"{self.color} {self.kind_phrase}"

    @property
    def cell(self) -> int:
        """Index of the cell in raster order."""
        return self.row * GRID_SIZE + self.column

    @property
    def cell_name(self) -> str:
        """One of CELL_NAMES."""
        return CELL_NAMES[self.cell]

    @property
    def cell_box(self) -> tuple[int, int, int, int]:
        """x, y, width, height of the cell in pixels."""
        return self.column * CELL_PIXELS, self.row * CELL_PIXELS, CELL_PIXELS, CELL_PIXELS


@dataclass(frozen=True)
class Scene:
    """Objects in raster order."""

    objects: tuple[SceneObject, ...]

    @property
    def objects_of_unique_kind(self) -> list[SceneObject]:
        """The objects whose kind occurs once."""
        kinds = [item.kind for item in self.objects]
        return [item for item in self.objects if kinds.count(item.kind) == 1]


def scene_rng(seed: int, stream: str, index: int) -> np.random.Generator:
    """Return the generator of one scene; ``stream`` is train, val, tokenizer, or dataset/split as in ``gqa/val``."""
    return np.random.default_rng([seed, _STREAMS.index(stream), index])


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample the objects of a scene and their cells."""
    count = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    cells = sorted(rng.permutation(GRID_SIZE * GRID_SIZE)[:count].tolist())
    chosen: set[tuple[str, str]] = set()
    while len(chosen) < count:
        kinds = LETTERS if rng.random() < LETTER_PROBABILITY else SHAPES
        chosen.add((kinds[int(rng.integers(len(kinds)))], COLORS[int(rng.integers(len(COLORS)))]))
    names = sorted(chosen)  # a set has no order of its own
    order = rng.permutation(count).tolist()
    return Scene(
        tuple(
            SceneObject(names[index][0], names[index][1], cell // GRID_SIZE, cell % GRID_SIZE)
            for index, cell in zip(order, cells, strict=True)
        )
    )


def render_scene(scene: Scene, rng: np.random.Generator) -> Pixels:
    """Render a scene: grey background, each object displaced by 0 to 2 pixels and dimmed by up to a quarter, noise."""
    size = (IMAGE_PIXELS, IMAGE_PIXELS, 3)
    canvas = np.full(size, rng.integers(0, 70), dtype=np.float32)
    slack = CELL_PIXELS - _GLYPH_PIXELS
    for item in scene.objects:
        down, right = rng.integers(0, slack + 1, size=2).tolist()
        top, left = item.row * CELL_PIXELS + down, item.column * CELL_PIXELS + right
        color = np.asarray(_RGB[item.color], dtype=np.float32) * rng.uniform(0.75, 1.0)
        canvas[top : top + _GLYPH_PIXELS, left : left + _GLYPH_PIXELS][_GLYPHS[item.kind]] = color
    noise = 8 * rng.standard_normal(size, dtype=np.float32)
    return np.clip(canvas + noise, 0, 255).astype(np.uint8)


def _glyphs() -> dict[str, NDArray[np.bool_]]:
    """Return for each kind which pixels of a 10x10 square it covers."""
    y, x = np.mgrid[0:_GLYPH_PIXELS, 0:_GLYPH_PIXELS]
    middle = (_GLYPH_PIXELS - 1) / 2
    across, down = abs(x - middle), abs(y - middle)
    glyphs = {
        "circle": np.hypot(across, down) <= 4.6,
        "square": (across <= 3.6) & (down <= 3.6),
        "triangle": across <= y / 2 + 0.3,
        "cross": (across <= 1.2) | (down <= 1.2),
    }
    for letter, font in _FONT.items():
        rows = [[bit == "1" for bit in row] for row in font.split()]
        rows.append(rows[-1])  # the lowest line is two pixels high
        glyphs[letter] = np.zeros((_GLYPH_PIXELS, _GLYPH_PIXELS), dtype=bool)
        glyphs[letter][1:9, 2:7] = rows
    return glyphs


_GLYPHS = _glyphs()
