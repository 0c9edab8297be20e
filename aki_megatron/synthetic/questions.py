"""What is said and asked about a scene: captions, questions with answers, relations, choices.

Every function is pure: a scene and a random stream in, text out; None where the scene does not carry such a question.
The tasks follow a small study of attention masks: counting, colour, existence, reading a letter, two-step search.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from aki_megatron.errors import DataError
from aki_megatron.synthetic.scenes import COLORS, GRID, KINDS, LETTERS, PLACES, SHAPES, Scene, SceneObject

CHOICES = 4
"""Options of a multiple-choice question."""

_COUNT_KEPT = (0.35, 0.55, 0.9, 1.0, 1.0)
"""Share of counting questions kept per answer: most counts are 0 or 1, which would make guessing easy."""

_STEPS = (("left of", 0, -1), ("right of", 0, 1), ("above", -1, 0), ("below", 1, 0))
"""Relation, and where its first object stands seen from the second: rows down, columns right."""

RELATIONS = tuple(relation for relation, _, _ in _STEPS)
"""Relations of two objects that statements and phrases speak of; ``holds`` decides them."""

_NAMED = re.compile(r"(?P<place>\S+) \((?P<color>\w+) (?P<kind>\w+)\)")


@dataclass(frozen=True)
class Question:
    """An open question with its one right answer; answer_type is VQAv2's: yes/no, number or other."""

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
class Choice:
    """A question with CHOICES different options."""

    text: str
    options: tuple[str, ...]
    correct: int


def caption(scene: Scene) -> str:
    """Every object with its place, in raster order: ``top-left (red circle), center (blue a).``

    The name follows a bracket, not a space, so that its first token is the one with which an answer begins.
    """
    return ", ".join(f"{thing.place} ({thing.name})" for thing in scene.objects) + "."


def read_caption(text: str) -> Scene:
    """The scene that a caption names; the inverse of ``caption``. Raises DataError for any other text."""
    parts = [_NAMED.fullmatch(part) for part in text.removesuffix(".").split(", ")]
    objects = []
    for part in parts:
        if part is None or part["place"] not in PLACES or part["color"] not in COLORS or part["kind"] not in KINDS:
            raise DataError(
                f"Not the caption of a drawn scene: {text[:200]!r}; draw the data anew (tools/make_data.py)."
            )
        cell = PLACES.index(part["place"])
        objects.append(SceneObject(part["kind"], part["color"], cell // GRID, cell % GRID))
    return Scene(tuple(objects))


def count(scene: Scene, rng: random.Random) -> Question | None:
    """How many objects have a colour or a shape."""
    if rng.random() < 0.5:
        word = rng.choice(COLORS)
        number = sum(thing.color == word for thing in scene.objects)
    else:
        word = rng.choice(SHAPES)
        number = sum(thing.kind == word for thing in scene.objects)
    if number >= len(_COUNT_KEPT) or rng.random() > _COUNT_KEPT[number]:
        return None
    return Question("count", f"How many {word} objects are there?", str(number), "number")


def color(scene: Scene, rng: random.Random) -> Question | None:
    """The colour of an object whose kind occurs once."""
    kinds = [thing.kind for thing in scene.objects]
    alone = [thing for thing in scene.objects if kinds.count(thing.kind) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    return Question("color", f"What color is the {thing.kind}?", thing.color, "other")


def exist(scene: Scene, rng: random.Random) -> Question | None:
    """Whether an object is there, half of the time it is.

    An absent one is drawn as in two splits of POPE, half each: at random, or adversarially, its colour and its kind
    both there but on different objects. The random half is what a small model starts to learn from.
    """
    names = {(thing.color, thing.kind) for thing in scene.objects}
    if rng.random() < 0.5:
        thing = rng.choice(scene.objects)
        return Question("exist", f"Is there a {thing.name}?", "yes", "yes/no")
    colors, kinds = sorted({name[0] for name in names}), sorted({name[1] for name in names})
    if rng.random() < 0.5:
        colors, kinds = list(COLORS), list(KINDS)
    absent = [f"{hue} {kind}" for hue in colors for kind in kinds if (hue, kind) not in names]
    if not absent:
        return None
    return Question("exist", f"Is there a {rng.choice(absent)}?", "no", "yes/no")


def ocr(scene: Scene, rng: random.Random) -> Question | None:
    """Which letter has a colour that no other letter of the scene has."""
    letters = [thing for thing in scene.objects if thing.kind in LETTERS]
    colors = [thing.color for thing in letters]
    alone = [thing for thing in letters if colors.count(thing.color) == 1]
    if not alone:
        return None
    thing = rng.choice(alone)
    return Question("ocr", f"What letter is {thing.color}?", thing.kind, "other")


def hop(scene: Scene, rng: random.Random) -> Question | None:
    """Two steps: find an object, then name its neighbour in one direction."""
    at = {(thing.row, thing.column): thing for thing in scene.objects}
    pairs = [
        (relation, thing, at[place])
        for thing in scene.objects
        for relation, down, right in _STEPS
        if (place := (thing.row + down, thing.column + right)) in at
    ]
    if not pairs:
        return None
    relation, thing, neighbour = rng.choice(pairs)
    return Question("hop", f"What is directly {relation} the {thing.name}?", neighbour.name, "other")


TASKS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "count": count,
    "color": color,
    "exist": exist,
    "ocr": ocr,
    "hop": hop,
}
"""The open questions by the name their question_type carries."""

SHARES = {"count": 6, "color": 4, "exist": 8, "ocr": 1, "hop": 1}
"""How often each is asked, relative to the others: most often what a small model learns late and still in minutes."""


def holds(relation: str, first: SceneObject, second: SceneObject) -> bool:
    """Whether ``first`` stands in that relation to ``second``; distance does not matter."""
    return {
        "left of": first.column < second.column,
        "right of": first.column > second.column,
        "above": first.row < second.row,
        "below": first.row > second.row,
    }[relation]


def statement(scene: Scene, rng: random.Random) -> Statement:
    """A relation between two objects that differ along its axis, so that either it or its opposite holds."""
    first, second = rng.sample(scene.objects, 2)
    relations = [("left of", "right of")] if first.column != second.column else []
    relations += [("above", "below")] if first.row != second.row else []
    relation = rng.choice(rng.choice(relations))
    text = f"The {first.name} is {relation} the {second.name}."
    return Statement(text, relation, holds(relation, first, second))


def choice(scene: Scene, rng: random.Random) -> Choice:
    """Which object is in a place. Wrong options stand elsewhere in the scene; absent ones fill up short scenes."""
    right = rng.choice(scene.objects)
    wrong = [thing.name for thing in scene.objects if thing is not right]
    rng.shuffle(wrong)
    while len(wrong) < CHOICES - 1:
        name = f"{rng.choice(COLORS)} {rng.choice(KINDS)}"
        if name not in wrong and name != right.name:
            wrong.append(name)
    options = [right.name, *wrong[: CHOICES - 1]]
    rng.shuffle(options)
    return Choice(f"Which object is {right.place}?", tuple(options), options.index(right.name))


def regions(scene: Scene, rng: random.Random, *, most: int) -> list[SceneObject]:
    """Up to ``most`` different objects whose cells are to be described."""
    return rng.sample(scene.objects, min(most, len(scene.objects)))
