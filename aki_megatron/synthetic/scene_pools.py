"""Which scenes a dataset is about: scenes of its own, or those of the captions.

A dataset with scenes of its own uses random streams of its own (``gqa/train``), so that adding one changes no byte of
the others.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from aki_megatron.synthetic.files import encode_image
from aki_megatron.synthetic.scenes import Scene, render_scene, sample_scene, scene_rng

FIRST_VAL_ID = 500_001
_MIN_SCENES = 20
_TRAIN_DIVISOR, _VAL_DIVISOR = 20, 10


@dataclass(frozen=True)
class SyntheticExample:
    """One scene of a dataset and the random generators of its image and its texts.

    index  position within ``split``, from 0
    """

    split: str
    index: int
    scene: Scene
    text_rng: random.Random
    image_rng: np.random.Generator

    @property
    def extension(self) -> str:
        """Extension of the image file, without a dot."""
        return image_extension(self.index)

    def encode_image(self, extension: str) -> bytes:
        """Render and encode the image. Call once: rendering advances ``image_rng``."""
        return encode_image(render_scene(self.scene, self.image_rng), extension)


def image_id(split: str, index: int) -> int:
    """Return the COCO-like id of a scene of the captions; those of val begin at FIRST_VAL_ID."""
    return index + (1 if split == "train" else FIRST_VAL_ID)


def image_extension(index: int) -> str:
    """Return png for every fifth scene, which formats whose file names end in .jpg cannot show, else jpg."""
    return "png" if index % 5 == 4 else "jpg"


def is_in_coco_2017(index: int) -> bool:
    """Return whether the image of a scene of the captions is in A-OKVQA's train2017 or val2017 as well."""
    return index % 5 < 2


def pool_size(split: str, train_scenes: int, val_scenes: int) -> int:
    """Return the scenes of a split of each extra dataset: a twentieth of the training scenes, a tenth of val's."""
    if split == "train":
        return min(train_scenes, max(_MIN_SCENES, train_scenes // _TRAIN_DIVISOR))
    return min(val_scenes, max(_MIN_SCENES, val_scenes // _VAL_DIVISOR))


def own_scenes(
    seed: int, name: str, split: str, count: int, sample: Callable[[np.random.Generator], Scene] = sample_scene
) -> Iterator[SyntheticExample]:
    """Yield ``count`` scenes from the dataset's own random streams."""
    for index in range(count):
        rng = scene_rng(seed, f"{name}/{split}", index)
        yield SyntheticExample(split, index, sample(rng), random.Random(f"{seed}/{name}/{split}/{index}"), rng)


def shared_scenes(
    seed: int, name: str, split: str, count: int, accept: Callable[[int], bool] = lambda index: True
) -> Iterator[SyntheticExample]:
    """Yield those of the captions' first ``count`` scenes whose index ``accept`` accepts; their image files exist."""
    for index in filter(accept, range(count)):
        rng = scene_rng(seed, split, index)
        yield SyntheticExample(split, index, sample_scene(rng), random.Random(f"{seed}/{name}/{split}/{index}"), rng)
