"""Which scenes a set asks about: scenes of its own, or those that the first sets have drawn already.

A set of its own draws from streams of its own (``gqa/train``), so that adding one changes no byte of the others.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from aki_megatron.synthetic.scenes import LETTERS, Scene, SceneObject, draw_scene, paint, scene_rng
from aki_megatron.synthetic.writers import encode_jpeg, encode_png

FIRST_HELD_OUT_ID = 500_001
_FEWEST = 20
_TRAIN_SHARE, _HELD_OUT_SHARE = 20, 10


@dataclass(frozen=True)
class Drawn:
    """One scene that a set asks about.

    ``number`` counts from 0 within ``split``; ``words`` is the stream from which the set's texts are drawn.
    """

    split: str
    number: int
    scene: Scene
    words: random.Random
    _pixels: np.random.Generator

    @property
    def extension(self) -> str:
        """Ending of the picture's file name."""
        return "png" if is_png(self.number) else "jpg"

    def picture(self, extension: str) -> bytes:
        """The encoded picture; paint it once, for it draws from a stream."""
        pixels = paint(self.scene, self._pixels)
        return encode_png(pixels) if extension == "png" else encode_jpeg(pixels)


def image_id(split: str, number: int) -> int:
    """COCO-like id of a scene of the first sets: held-out ones begin at FIRST_HELD_OUT_ID."""
    return number + (1 if split == "train" else FIRST_HELD_OUT_ID)


def is_png(number: int) -> bool:
    """Whether a scene is stored as a PNG; such ones cannot serve datasets whose file names end in .jpg."""
    return number % 5 == 4


def serves_2017(number: int) -> bool:
    """Whether a scene of the first sets lies in A-OKVQA's train2017 or val2017 as well."""
    return number % 5 < 2


def pool_size(split: str, scenes: int, held_out: int) -> int:
    """Scenes of a split of each added set: a twentieth of the training scenes, a tenth of the held-out ones."""
    if split == "train":
        return min(scenes, max(_FEWEST, scenes // _TRAIN_SHARE))
    return min(held_out, max(_FEWEST, held_out // _HELD_OUT_SHARE))


def own_scenes(
    seed: int, name: str, split: str, count: int, draw: Callable[[np.random.Generator], Scene] = draw_scene
) -> Iterator[Drawn]:
    """``count`` scenes of a set's own."""
    for number in range(count):
        rng = scene_rng(seed, f"{name}/{split}", number)
        yield Drawn(split, number, draw(rng), random.Random(f"{seed}/{name}/{split}/{number}"), rng)


def shared_scenes(
    seed: int, name: str, split: str, count: int, serves: Callable[[int], bool] = lambda number: True
) -> Iterator[Drawn]:
    """The scenes among the first ``count`` of the captions' pool that ``serves`` lets pass; their pictures exist."""
    for number in filter(serves, range(count)):
        rng = scene_rng(seed, split, number)
        yield Drawn(split, number, draw_scene(rng), random.Random(f"{seed}/{name}/{split}/{number}"), rng)


def noun(thing: SceneObject) -> str:
    """What a thing is, in words that cannot be mistaken for an article: ``circle``, ``letter a``."""
    return f"letter {thing.kind}" if thing.kind in LETTERS else thing.kind


def described(thing: SceneObject) -> str:
    """``red circle``, ``blue letter a``: names an object of a scene without ambiguity."""
    return f"{thing.color} {noun(thing)}"


def alone(scene: Scene) -> list[SceneObject]:
    """The objects whose kind occurs once."""
    kinds = [thing.kind for thing in scene.objects]
    return [thing for thing in scene.objects if kinds.count(thing.kind) == 1]
