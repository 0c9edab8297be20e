"""Scenes with questions and answers, one at a time and in memory: to begin with on a page that shows a model."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from aki_megatron.synthetic.files import encode_image
from aki_megatron.synthetic.questions import TASKS, Question, scene_caption
from aki_megatron.synthetic.scenes import render_scene, sample_scene, scene_rng

EXAMPLE_TASKS = ("color", "exist", "ocr", "count")
"""Tasks of an example's questions; what a small model learns first comes first."""

_ATTEMPTS = 8
"""How often a question of a task is sampled before the scene is taken to have none."""


@dataclass(frozen=True)
class DrawnExample:
    """A scene: a PNG, its caption, and at most one question of each task."""

    image: bytes
    caption: str
    questions: tuple[Question, ...]


def draw_examples(count: int, seed: int) -> Iterator[DrawnExample]:
    """Draw scenes of the stream val; with the seed of a dataset they are scenes that no model has trained on."""
    for index in range(count):
        rng = scene_rng(seed, "val", index)
        scene = sample_scene(rng)
        image = encode_image(render_scene(scene, rng), "png")
        words = random.Random(index)
        sampled = (
            next(filter(None, (TASKS[task](scene, words) for _ in range(_ATTEMPTS))), None) for task in EXAMPLE_TASKS
        )
        questions = [question for question in sampled if question is not None]
        yield DrawnExample(image, scene_caption(scene), tuple(questions))
