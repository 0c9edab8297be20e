"""GQA (https://cs.stanford.edu/people/dorarad/gqa): questions with their functional programs, images of its own.

A JSON object per split, question id -> question, answer, program (``semantic``), ``types`` and the objects that the
words refer to; images GQA/images/{imageId}.jpg.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.synthetic.files import write_json
from aki_megatron.synthetic.questions import RELATIONS, holds
from aki_megatron.synthetic.scene_pools import SyntheticExample
from aki_megatron.synthetic.scenes import COLORS, KINDS, Scene, SceneObject

IMAGES = "GQA/images"
_QUESTIONS_PER_SCENE = 3
_FIRST_IMAGE_ID = {"train": 2_300_001, "val": 2_400_001}
"""First image id of a split; GQA's images are Visual Genome's, with ids of seven digits."""

ProgramStep = tuple[str, str, tuple[int, ...]]
"""Operation, argument, the steps it depends on."""


@dataclass(frozen=True)
class GqaQuestion:
    """A question, its short and its full answer, its program, its types, and the objects it mentions."""

    text: str
    answer: str
    full_answer: str
    program: tuple[ProgramStep, ...]
    structural_type: str
    semantic_type: str
    detailed_type: str
    mentioned: tuple[SceneObject, ...]


def write(root: Path, examples: Iterable[SyntheticExample]) -> dict[str, int]:
    """Write both question files and the images under ``root``; return the number of questions by ``split/gqa``."""
    files: dict[str, dict[str, Any]] = {"train": {}, "val": {}}
    for example in examples:
        image = _FIRST_IMAGE_ID[example.split] + example.index
        (root / IMAGES / f"{image}.jpg").write_bytes(example.encode_image("jpg"))
        for number, question in enumerate(sample_questions(example.scene, example.text_rng)):
            question_id = f"{image}{number:02}"
            files[example.split][question_id] = _entry(question, question_id, image)
    for split, entries in files.items():
        write_json(root / f"GQA/{split}_balanced_questions.json", entries)
    return {f"{split}/gqa": len(entries) for split, entries in files.items()}


def sample_questions(scene: Scene, rng: random.Random) -> list[GqaQuestion]:
    """Return up to three questions of different kinds."""
    kinds = rng.sample(QUESTION_KINDS, len(QUESTION_KINDS))
    return [question for kind in kinds if (question := kind(scene, rng))][:_QUESTIONS_PER_SCENE]


def query_color(scene: Scene, rng: random.Random) -> GqaQuestion | None:
    """Ask for the colour of an object whose kind occurs once."""
    if not (unique := scene.objects_of_unique_kind):
        return None
    item = rng.choice(unique)
    program = (_select(item), ("query", "color", (0,)))
    text, full = f"What color is the {item.kind_phrase}?", f"The {item.kind_phrase} is {item.color}."
    return GqaQuestion(text, item.color, full, program, "query", "attr", "color", (item,))


def verify_color(scene: Scene, rng: random.Random) -> GqaQuestion | None:
    """Ask whether such an object has a colour; half of the time it has."""
    if not (unique := scene.objects_of_unique_kind):
        return None
    item = rng.choice(unique)
    color = item.color if rng.random() < 0.5 else rng.choice([other for other in COLORS if other != item.color])
    answer = _yes_no(color == item.color)
    program = (_select(item), ("verify color", color, (0,)))
    full = f"{answer.capitalize()}, the {item.kind_phrase} is {item.color}."
    text = f"Is the {item.kind_phrase} {color}?"
    return GqaQuestion(text, answer, full, program, "verify", "attr", "verifyAttr", (item,))


def choose_color(scene: Scene, rng: random.Random) -> GqaQuestion | None:
    """Ask which of two colours such an object has."""
    if not (unique := scene.objects_of_unique_kind):
        return None
    item = rng.choice(unique)
    colors = [item.color, rng.choice([other for other in COLORS if other != item.color])]
    rng.shuffle(colors)
    program = (_select(item), ("choose color", "|".join(colors), (0,)))
    text = f"Is the {item.kind_phrase} {colors[0]} or {colors[1]}?"
    full = f"The {item.kind_phrase} is {item.color}."
    return GqaQuestion(text, item.color, full, program, "choose", "attr", "chooseAttr", (item,))


def verify_existence(scene: Scene, rng: random.Random) -> GqaQuestion | None:
    """Ask whether an object is there; half of the time it is."""
    item, present = _present_or_absent(scene, rng)
    program = (_select(item, present=present), ("exist", "?", (0,)))
    full = f"Yes, there is a {item.phrase}." if present else f"No, there is no {item.phrase}."
    text = f"Is there a {item.phrase} in the picture?"
    mentioned = (item,) if present else ()
    return GqaQuestion(text, _yes_no(present), full, program, "verify", "obj", "existAttr", mentioned)


def verify_both(scene: Scene, rng: random.Random) -> GqaQuestion | None:
    """Ask whether two objects are there; half of the time they are."""
    first, other = rng.sample(scene.objects, 2)
    second, present = (other, True) if rng.random() < 0.5 else (_absent_object(scene, rng), False)
    program: tuple[ProgramStep, ...] = (
        *(_select(first), ("exist", "?", (0,))),
        *(_select(second, present=present), ("exist", "?", (2,)), ("and", "", (1, 3))),
    )
    text = f"Are there both a {first.phrase} and a {second.phrase} in the picture?"
    answer = _yes_no(present)
    full = f"{answer.capitalize()}, there is {'also' if present else 'no'} {second.phrase}."
    mentioned = (first, second)[: 2 if present else 1]
    return GqaQuestion(text, answer, full, program, "logical", "obj", "existAnd", mentioned)


def query_relation(scene: Scene, rng: random.Random) -> GqaQuestion | None:
    """Ask for the one object that stands in a relation to another."""
    found = []
    for anchor in scene.objects:
        for relation in RELATIONS:
            related = [item for item in scene.objects if holds(relation, item, anchor)]
            if len(related) == 1:
                found.append((anchor, relation, related[0]))
    if not found:
        return None
    anchor, relation, item = rng.choice(found)
    phrase = f"to the {relation}" if relation in RELATIONS[:2] else relation
    program = (_select(anchor), ("relate", f"_,{phrase},s ({item.cell})", (0,)), ("query", "name", (1,)))
    full = f"The {item.phrase} is {phrase} the {anchor.phrase}."
    text = f"What is {phrase} the {anchor.phrase}?"
    return GqaQuestion(text, item.phrase, full, program, "query", "rel", "relS", (anchor,))


def compare_color(scene: Scene, rng: random.Random) -> GqaQuestion | None:
    """Ask whether two objects, each the only one of its kind, have the same colour."""
    unique = scene.objects_of_unique_kind
    if len(unique) < 2:
        return None
    pairs = [(one, two) for index, one in enumerate(unique) for two in unique[index + 1 :]]
    equal = [pair for pair in pairs if pair[0].color == pair[1].color]
    first, second = rng.choice(equal if equal and rng.random() < 0.5 else pairs)
    answer = _yes_no(first.color == second.color)
    program: tuple[ProgramStep, ...] = (_select(first), _select(second), ("same color", "", (0, 1)))
    text = f"Do the {first.kind_phrase} and the {second.kind_phrase} have the same color?"
    colors = f"the {first.kind_phrase} is {first.color} and the {second.kind_phrase} is {second.color}"
    full = f"{answer.capitalize()}, {colors}."
    return GqaQuestion(text, answer, full, program, "compare", "attr", "twoSame", (first, second))


QUESTION_KINDS: Sequence[Callable[[Scene, random.Random], GqaQuestion | None]] = (
    *(query_color, verify_color, choose_color, verify_existence, verify_both, query_relation, compare_color),
)


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _absent_object(scene: Scene, rng: random.Random) -> SceneObject:
    present = {item.name for item in scene.objects}
    absent = [(kind, color) for kind in KINDS for color in COLORS if f"{color} {kind}" not in present]
    return SceneObject(*rng.choice(absent), row=-1, column=-1)


def _present_or_absent(scene: Scene, rng: random.Random) -> tuple[SceneObject, bool]:
    present = rng.random() < 0.5
    return (rng.choice(scene.objects) if present else _absent_object(scene, rng)), present


def _select(item: SceneObject, *, present: bool = True) -> ProgramStep:
    """Return the step that finds an object, ``-`` where there is none; _entry replaces the cell by the object's id."""
    return "select", f"{item.kind_phrase} ({item.cell if present else '-'})", ()


def _entry(question: GqaQuestion, question_id: str, image: int) -> dict[str, Any]:
    """Return the question as GQA stores it."""
    program = [
        {"operation": operation, "dependencies": list(dependencies), "argument": _with_object_id(argument, image)}
        for operation, argument, dependencies in question.program
    ]
    program_text = "->".join(
        f"{step['operation']}: {step['argument']} [{','.join(map(str, step['dependencies']))}]"
        if step["dependencies"]
        else f"{step['operation']}: {step['argument']}"
        for step in program
    )
    structural, semantic, detailed = question.structural_type, question.semantic_type, question.detailed_type
    return {
        "semantic": program,
        "entailed": [question_id],
        "equivalent": [question_id],
        "question": question.text,
        "imageId": str(image),
        "isBalanced": True,
        "groups": {"global": detailed, "local": f"{structural}-{detailed}"},
        "answer": question.answer,
        "semanticStr": program_text,
        "annotations": {"answer": {}, "question": _word_to_object(question, image), "fullAnswer": {}},
        "types": {"detailed": detailed, "semantic": semantic, "structural": structural},
        "fullAnswer": question.full_answer,
    }


def _with_object_id(argument: str, image: int) -> str:
    """Replace the cell of ``circle (4)`` by the object id of that image."""
    head, bracket, cell = argument.rpartition("(")
    return f"{head}({image * 10 + int(cell[:-1])})" if bracket and cell[:-1].isdigit() else argument


def _word_to_object(question: GqaQuestion, image: int) -> dict[str, str]:
    """Return word index, or ``first:end`` for several words, -> object id."""
    words, found = question.text.rstrip("?").split(), {}
    for item in question.mentioned:
        for name in (item.phrase.split(), item.kind_phrase.split()):
            starts = [start for start in range(len(words)) if words[start : start + len(name)] == name]
            if starts:
                key = str(starts[0]) if len(name) == 1 else f"{starts[0]}:{starts[0] + len(name)}"
                found[key] = str(image * 10 + item.cell)
                break
    return found
