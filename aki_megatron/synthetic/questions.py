"""Captions, questions with answers, relations and multiple-choice questions about a scene.

Every function is pure: a scene and a random generator in, text out; None where the scene has no such question.
The tasks follow a small study of attention masks: counting, colour, existence, reading a letter, two-step search.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from aki_megatron.errors import DataError
from aki_megatron.synthetic.scenes import CELL_NAMES, COLORS, GRID_SIZE, KINDS, LETTERS, SHAPES, Scene, SceneObject

NUM_OPTIONS = 4
"""Options of a multiple-choice question."""

_COUNT_KEEP_PROBABILITY = (0.35, 0.55, 0.9, 1.0, 1.0)
"""Probability of keeping a counting question, by its answer: most counts are 0 or 1, which would be easy to guess."""

_OFFSETS = (("left of", 0, -1), ("right of", 0, 1), ("above", -1, 0), ("below", 1, 0))
"""Relation, and the offset of its first object from the second: rows down, columns right."""

RELATIONS = tuple(relation for relation, _, _ in _OFFSETS)
"""Relations of two objects; ``holds`` decides them."""

_CAPTION_OBJECT = re.compile(r"(?P<cell>\S+) \((?P<color>\w+) (?P<kind>\w+)\)")


@dataclass(frozen=True)
class Question:
    """An open question with its one answer; answer_type is VQAv2's: yes/no, number or other."""

    task: str
    text: str
    answer: str
    answer_type: str


@dataclass(frozen=True)
class Statement:
    """A sentence about two objects that is true or false."""

    text: str
    relation: str
    true: bool


@dataclass(frozen=True)
class MultipleChoice:
    """A question with NUM_OPTIONS different options; ``correct`` is the index of the answer."""

    text: str
    options: tuple[str, ...]
    correct: int


def scene_caption(scene: Scene) -> str:
    """Return every object with its cell, in raster order: ``top-left (red circle), center (blue a).``

    The object follows a bracket, not a space, so that its first token is the one with which an answer begins.
    """
    return ", ".join(f"{item.cell_name} ({item.name})" for item in scene.objects) + "."


def parse_caption(text: str) -> Scene:
    """Return the scene of a caption; the inverse of ``scene_caption``. Raises DataError for any other text."""
    parts = [_CAPTION_OBJECT.fullmatch(part) for part in text.removesuffix(".").split(", ")]
    objects = []
    for part in parts:
        if part is None or part["cell"] not in CELL_NAMES or part["color"] not in COLORS or part["kind"] not in KINDS:
            raise DataError(
                f"Not the caption of a synthetic scene: {text[:200]!r}; write the data again (tools/make_data.py)."
            )
        cell = CELL_NAMES.index(part["cell"])
        objects.append(SceneObject(part["kind"], part["color"], cell // GRID_SIZE, cell % GRID_SIZE))
    return Scene(tuple(objects))


def count_question(scene: Scene, rng: random.Random) -> Question | None:
    """Ask how many objects have a colour or a shape."""
    if rng.random() < 0.5:
        word = rng.choice(COLORS)
        number = sum(item.color == word for item in scene.objects)
    else:
        word = rng.choice(SHAPES)
        number = sum(item.kind == word for item in scene.objects)
    if number >= len(_COUNT_KEEP_PROBABILITY) or rng.random() > _COUNT_KEEP_PROBABILITY[number]:
        return None
    return Question("count", f"How many {word} objects are there?", str(number), "number")


def color_question(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the colour of an object whose kind occurs once."""
    if not (unique := scene.objects_of_unique_kind):
        return None
    item = rng.choice(unique)
    return Question("color", f"What color is the {item.kind}?", item.color, "other")


def existence_question(scene: Scene, rng: random.Random) -> Question | None:
    """Ask whether an object is there; half of the time it is.

    An absent one is sampled as in two splits of POPE (arXiv 2305.10355), half each: at random, or adversarially, its
    colour and its kind both there but on different objects. The random half is what a small model learns first.
    """
    names = {(item.color, item.kind) for item in scene.objects}
    if rng.random() < 0.5:
        item = rng.choice(scene.objects)
        return Question("exist", f"Is there a {item.name}?", "yes", "yes/no")
    colors, kinds = sorted({name[0] for name in names}), sorted({name[1] for name in names})
    if rng.random() < 0.5:
        colors, kinds = list(COLORS), list(KINDS)
    absent = [f"{color} {kind}" for color in colors for kind in kinds if (color, kind) not in names]
    if not absent:
        return None
    return Question("exist", f"Is there a {rng.choice(absent)}?", "no", "yes/no")


def letter_question(scene: Scene, rng: random.Random) -> Question | None:
    """Ask which letter has a colour that no other letter of the scene has."""
    letters = [item for item in scene.objects if item.kind in LETTERS]
    colors = [item.color for item in letters]
    unique = [item for item in letters if colors.count(item.color) == 1]
    if not unique:
        return None
    item = rng.choice(unique)
    return Question("ocr", f"What letter is {item.color}?", item.kind, "other")


def neighbor_question(scene: Scene, rng: random.Random) -> Question | None:
    """Ask for the neighbour of an object in one direction: find the object, then its neighbour."""
    by_cell = {(item.row, item.column): item for item in scene.objects}
    pairs = [
        (relation, item, by_cell[cell])
        for item in scene.objects
        for relation, down, right in _OFFSETS
        if (cell := (item.row + down, item.column + right)) in by_cell
    ]
    if not pairs:
        return None
    relation, item, neighbor = rng.choice(pairs)
    return Question("hop", f"What is directly {relation} the {item.name}?", neighbor.name, "other")


TASKS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "count": count_question,
    "color": color_question,
    "exist": existence_question,
    "ocr": letter_question,
    "hop": neighbor_question,
}
"""The open questions by the name that VQAv2's question_type holds."""

TASK_WEIGHTS = {"count": 6, "color": 4, "exist": 8, "ocr": 1, "hop": 1}
"""Relative frequency of each task: most often what a small model learns late, yet within minutes."""


def holds(relation: str, first: SceneObject, second: SceneObject) -> bool:
    """Return whether ``first`` stands in ``relation`` to ``second``, at any distance."""
    return {
        "left of": first.column < second.column,
        "right of": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[relation]


def sample_statement(scene: Scene, rng: random.Random) -> Statement:
    """Relate two objects that differ along the relation's axis, so that either it or its opposite holds."""
    first, second = rng.sample(scene.objects, 2)
    relations = [("left of", "right of")] if first.column != second.column else []
    relations += [("above", "below")] if first.row != second.row else []
    relation = rng.choice(rng.choice(relations))
    text = f"The {first.name} is {relation} the {second.name}."
    return Statement(text, relation, holds(relation, first, second))


def sample_multiple_choice(scene: Scene, rng: random.Random) -> MultipleChoice:
    """Ask which object is in a cell. Wrong options are in other cells; absent objects fill up short scenes."""
    answer = rng.choice(scene.objects)
    wrong = [item.name for item in scene.objects if item is not answer]
    rng.shuffle(wrong)
    while len(wrong) < NUM_OPTIONS - 1:
        name = f"{rng.choice(COLORS)} {rng.choice(KINDS)}"
        if name not in wrong and name != answer.name:
            wrong.append(name)
    options = [answer.name, *wrong[: NUM_OPTIONS - 1]]
    rng.shuffle(options)
    return MultipleChoice(f"Which object is {answer.cell_name}?", tuple(options), options.index(answer.name))


def sample_objects(scene: Scene, rng: random.Random, *, max_objects: int) -> list[SceneObject]:
    """Sample up to ``max_objects`` different objects, whose cells are to be described."""
    return rng.sample(scene.objects, min(max_objects, len(scene.objects)))
