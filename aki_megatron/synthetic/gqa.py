"""GQA: questions with their functional programs about pictures of its own.

https://cs.stanford.edu/people/dorarad/gqa: a JSON object per split, question id -> question, answer, program
(``semantic``), kinds (``types``) and the objects that the words point at; pictures GQA/images/{imageId}.jpg.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.synthetic.questions import RELATIONS, holds
from aki_megatron.synthetic.scene_pools import Drawn, alone, described, noun
from aki_megatron.synthetic.scenes import COLORS, KINDS, Scene, SceneObject
from aki_megatron.synthetic.writers import write_json

IMAGES = "GQA/images"
_QUESTIONS_PER_SCENE = 3
_FIRST_IMAGE = {"train": 2_300_001, "val": 2_400_001}
"""Image ids of a split; GQA's pictures are Visual Genome's, with ids of seven digits."""

Step = tuple[str, str, tuple[int, ...]]
"""Operation, argument, the steps it depends on."""


@dataclass(frozen=True)
class Asked:
    """A question, its short and its full answer, its program, its types, and the objects it mentions."""

    text: str
    answer: str
    full_answer: str
    steps: tuple[Step, ...]
    structural: str
    semantic: str
    detailed: str
    mentioned: tuple[SceneObject, ...]


def write(root: Path, drawn: Iterable[Drawn]) -> dict[str, int]:
    """Write both question files and the pictures under ``root``; returns the number of questions per split."""
    files: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    for one in drawn:
        image = _FIRST_IMAGE[one.split] + one.number
        (root / IMAGES / f"{image}.jpg").write_bytes(one.picture("jpg"))
        for number, asked in enumerate(questions(one.scene, one.words)):
            question_id = f"{image}{number:02}"
            files[one.split][question_id] = _entry(asked, question_id, image)
    for split, entries in files.items():
        write_json(root / f"GQA/{split}_balanced_questions.json", entries)
    return {f"{split}/gqa": len(entries) for split, entries in files.items()}


def questions(scene: Scene, rng: random.Random) -> list[Asked]:
    """Three questions of different kinds."""
    kinds = rng.sample(KINDS_OF_QUESTIONS, len(KINDS_OF_QUESTIONS))
    return [asked for ask in kinds if (asked := ask(scene, rng))][:_QUESTIONS_PER_SCENE]


def query_color(scene: Scene, rng: random.Random) -> Asked | None:
    """The colour of an object whose kind occurs once."""
    if not (things := alone(scene)):
        return None
    thing = rng.choice(things)
    steps = (_select(thing), ("query", "color", (0,)))
    full = f"The {noun(thing)} is {thing.color}."
    return Asked(f"What color is the {noun(thing)}?", thing.color, full, steps, "query", "attr", "color", (thing,))


def verify_color(scene: Scene, rng: random.Random) -> Asked | None:
    """Whether such an object has a colour; half of the time it has."""
    if not (things := alone(scene)):
        return None
    thing = rng.choice(things)
    color = thing.color if rng.random() < 0.5 else rng.choice([hue for hue in COLORS if hue != thing.color])
    answer = "yes" if color == thing.color else "no"
    steps = (_select(thing), ("verify color", color, (0,)))
    full = f"{answer.capitalize()}, the {noun(thing)} is {thing.color}."
    return Asked(f"Is the {noun(thing)} {color}?", answer, full, steps, "verify", "attr", "verifyAttr", (thing,))


def choose_color(scene: Scene, rng: random.Random) -> Asked | None:
    """Which of two colours such an object has."""
    if not (things := alone(scene)):
        return None
    thing = rng.choice(things)
    colors = [thing.color, rng.choice([hue for hue in COLORS if hue != thing.color])]
    rng.shuffle(colors)
    steps = (_select(thing), ("choose color", "|".join(colors), (0,)))
    text, full = f"Is the {noun(thing)} {colors[0]} or {colors[1]}?", f"The {noun(thing)} is {thing.color}."
    return Asked(text, thing.color, full, steps, "choose", "attr", "chooseAttr", (thing,))


def exist(scene: Scene, rng: random.Random) -> Asked | None:
    """Whether an object is there; half of the time it is."""
    thing, there = _perhaps(scene, rng)
    steps = (_select(thing, there=there), ("exist", "?", (0,)))
    full = f"Yes, there is a {described(thing)}." if there else f"No, there is no {described(thing)}."
    text = f"Is there a {described(thing)} in the picture?"
    return Asked(text, _yes(there), full, steps, "verify", "obj", "existAttr", (thing,) if there else ())


def both(scene: Scene, rng: random.Random) -> Asked | None:
    """Whether two objects are there; half of the time they are."""
    first, other = rng.sample(scene.objects, 2)
    second, there = (other, True) if rng.random() < 0.5 else (_absent(scene, rng), False)
    steps: tuple[Step, ...] = (
        *(_select(first), ("exist", "?", (0,))),
        *(_select(second, there=there), ("exist", "?", (2,)), ("and", "", (1, 3))),
    )
    text = f"Are there both a {described(first)} and a {described(second)} in the picture?"
    full = f"{_yes(there).capitalize()}, there is {'also' if there else 'no'} {described(second)}."
    return Asked(text, _yes(there), full, steps, "logical", "obj", "existAnd", (first, second)[: 2 if there else 1])


def query_relation(scene: Scene, rng: random.Random) -> Asked | None:
    """The one object that stands in a relation to another."""
    found = []
    for anchor in scene.objects:
        for relation in RELATIONS:
            standing = [thing for thing in scene.objects if holds(relation, thing, anchor)]
            if len(standing) == 1:
                found.append((anchor, relation, standing[0]))
    if not found:
        return None
    anchor, relation, thing = rng.choice(found)
    words = f"to the {relation}" if relation in RELATIONS[:2] else relation
    steps = (_select(anchor), ("relate", f"_,{words},s ({_cell(thing)})", (0,)), ("query", "name", (1,)))
    full = f"The {described(thing)} is {words} the {described(anchor)}."
    text = f"What is {words} the {described(anchor)}?"
    return Asked(text, described(thing), full, steps, "query", "rel", "relS", (anchor,))


def same_color(scene: Scene, rng: random.Random) -> Asked | None:
    """Whether two objects, each alone of its kind, have one colour."""
    things = alone(scene)
    if len(things) < 2:
        return None
    pairs = [(one, two) for at, one in enumerate(things) for two in things[at + 1 :]]
    equal = [pair for pair in pairs if pair[0].color == pair[1].color]
    first, second = rng.choice(equal if equal and rng.random() < 0.5 else pairs)
    same = first.color == second.color
    steps: tuple[Step, ...] = (_select(first), _select(second), ("same color", "", (0, 1)))
    text = f"Do the {noun(first)} and the {noun(second)} have the same color?"
    full = f"{_yes(same).capitalize()}, the {noun(first)} is {first.color} and the {noun(second)} is {second.color}."
    return Asked(text, _yes(same), full, steps, "compare", "attr", "twoSame", (first, second))


KINDS_OF_QUESTIONS: Sequence[Callable[[Scene, random.Random], Asked | None]] = (
    *(query_color, verify_color, choose_color, exist, both, query_relation, same_color),
)


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _absent(scene: Scene, rng: random.Random) -> SceneObject:
    there = {thing.name for thing in scene.objects}
    missing = [(kind, hue) for kind in KINDS for hue in COLORS if f"{hue} {kind}" not in there]
    return SceneObject(*rng.choice(missing), row=-1, column=-1)


def _perhaps(scene: Scene, rng: random.Random) -> tuple[SceneObject, bool]:
    there = rng.random() < 0.5
    return (rng.choice(scene.objects) if there else _absent(scene, rng)), there


def _cell(thing: SceneObject) -> int:
    return thing.row * 3 + thing.column


def _select(thing: SceneObject, *, there: bool = True) -> Step:
    """The step that finds a thing; ``-`` stands where GQA finds none. The cell becomes the object's id in _entry."""
    return "select", f"{noun(thing)} ({_cell(thing) if there else '-'})", ()


def _entry(asked: Asked, question_id: str, image: int) -> dict[str, Any]:
    """The question as GQA stores it."""
    steps = [
        {"operation": operation, "dependencies": list(needs), "argument": _identified(argument, image)}
        for operation, argument, needs in asked.steps
    ]
    program = "->".join(
        f"{step['operation']}: {step['argument']} [{','.join(map(str, step['dependencies']))}]"
        if step["dependencies"]
        else f"{step['operation']}: {step['argument']}"
        for step in steps
    )
    return {
        "semantic": steps,
        "entailed": [question_id],
        "equivalent": [question_id],
        "question": asked.text,
        "imageId": str(image),
        "isBalanced": True,
        "groups": {"global": asked.detailed, "local": f"{asked.structural}-{asked.detailed}"},
        "answer": asked.answer,
        "semanticStr": program,
        "annotations": {"answer": {}, "question": _pointers(asked, image), "fullAnswer": {}},
        "types": {"detailed": asked.detailed, "semantic": asked.semantic, "structural": asked.structural},
        "fullAnswer": asked.full_answer,
    }


def _identified(argument: str, image: int) -> str:
    """``circle (4)`` with the cell's number made an object id of that picture."""
    head, bracket, cell = argument.rpartition("(")
    return f"{head}({image * 10 + int(cell[:-1])})" if bracket and cell[:-1].isdigit() else argument


def _pointers(asked: Asked, image: int) -> dict[str, str]:
    """Word number, or ``first:behind`` for several words, -> object id."""
    words, found = asked.text.rstrip("?").split(), {}
    for thing in asked.mentioned:
        for name in (described(thing).split(), noun(thing).split()):
            starts = [at for at in range(len(words)) if words[at : at + len(name)] == name]
            if starts:
                key = str(starts[0]) if len(name) == 1 else f"{starts[0]}:{starts[0] + len(name)}"
                found[key] = str(image * 10 + _cell(thing))
                break
    return found
