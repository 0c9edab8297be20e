"""ScienceQA: multiple choice, half of it without a picture, with and without a hint.

https://scienceqa.github.io: problems.json, id -> question, choices, answer (index), hint, image (name or null),
lecture, solution, split and the place in the curriculum; pid_splits.json; images/{split}/{id}/image.png.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.synthetic import questions as ask
from aki_megatron.synthetic.scene_pools import Drawn, alone, noun
from aki_megatron.synthetic.scenes import COLORS, LETTERS, MAX_OBJECTS, MIN_OBJECTS, SHAPES, Scene
from aki_megatron.synthetic.writers import write_json

SPLITS = ("train", "val", "test")
IMAGE = "image.png"
_FACTS = (
    ("Which shape has three sides?", "triangle", SHAPES),
    ("Which shape has four sides of the same length?", "square", SHAPES),
    ("Which shape has no corner?", "circle", SHAPES),
    ("Which shape is made of two bars?", "cross", SHAPES),
    *(
        (f"Which letter comes directly after the letter {one}?", two, LETTERS)
        for one, two in zip(LETTERS, LETTERS[1:], strict=False)
    ),
    *(
        (f"Which letter comes directly before the letter {two}?", one, LETTERS)
        for one, two in zip(LETTERS, LETTERS[1:], strict=False)
    ),
)


@dataclass(frozen=True)
class Problem:
    """A question with its choices; ``subject`` is one of ScienceQA's three."""

    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    lecture: str
    solution: str
    subject: str
    topic: str


def write(root: Path, drawn: Iterable[Drawn]) -> dict[str, int]:
    """Write problems.json, pid_splits.json and the pictures; returns the number of problems per split."""
    problems: dict[str, Any] = {}
    numbers: dict[str, list[str]] = {split: [] for split in SPLITS}
    for one in drawn:
        problem_id = str(len(problems) + 1)
        kind = KINDS_OF_PROBLEMS[one.number % len(KINDS_OF_PROBLEMS)]
        has_image = kind in WITH_IMAGE
        problems[problem_id] = _entry(kind(one.scene, one.words), one.split, IMAGE if has_image else None)
        numbers[one.split].append(problem_id)
        if has_image:
            folder = root / "ScienceQA/images" / one.split / problem_id
            folder.mkdir(parents=True)
            (folder / IMAGE).write_bytes(one.picture("png"))
    write_json(root / "ScienceQA/problems.json", problems)
    write_json(root / "ScienceQA/pid_splits.json", {**numbers, "trainval": numbers["train"] + numbers["val"]})
    return {f"{split}/scienceqa": len(found) for split, found in numbers.items()}


def place(scene: Scene, rng: random.Random) -> Problem:
    """With a picture and a hint: what stands in a place."""
    drawn = ask.choice(scene, rng)
    hint = f"The picture shows {len(scene.objects)} objects on a grid of three rows and three columns."
    lecture = "A place on a grid is named by its row and its column."
    right = drawn.options[drawn.correct]
    solution = f"Look at the place that is named. The object there is the {right}."
    return Problem(drawn.text, drawn.options, drawn.correct, hint, lecture, solution, "social science", "geography")


def appearance(scene: Scene, rng: random.Random) -> Problem:
    """With a picture, without a hint: the colour of a thing, or how many there are where no kind occurs once."""
    lecture = "An object can be described by properties such as its color and its shape."
    if things := alone(scene):
        thing = rng.choice(things)
        choices, answer = _mixed(thing.color, COLORS, rng, most=len(COLORS))
        text, solution = f"What color is the {noun(thing)}?", f"The {noun(thing)} is {thing.color}."
    else:
        number = str(len(scene.objects))
        numbers = [str(count) for count in range(MIN_OBJECTS, MAX_OBJECTS + 1)]
        choices, answer = _mixed(number, numbers, rng, most=len(numbers))
        text, solution = "How many objects are there?", f"Count them one by one: there are {number}."
    return Problem(text, choices, answer, "", lecture, solution, "natural science", "physics")


def context(scene: Scene, rng: random.Random) -> Problem:
    """Without a picture: the hint says in words what a picture would show."""
    hint = f"These objects lie on a grid: {ask.caption(scene)}"
    lecture = "A text can say where things are. Read it step by step."
    if question := ask.hop(scene, rng):
        others = [thing.name for thing in scene.objects]
        choices, answer = _mixed(question.answer, others, rng, most=3)
        return Problem(
            question.text,
            choices,
            answer,
            hint,
            lecture,
            f"Read the hint. It is the {question.answer}.",
            "language science",
            "reading-comprehension",
        )
    drawn = ask.choice(scene, rng)
    solution = f"Read the hint. It is the {drawn.options[drawn.correct]}."
    return Problem(
        drawn.text, drawn.options, drawn.correct, hint, lecture, solution, "language science", "reading-comprehension"
    )


def knowledge(scene: Scene, rng: random.Random) -> Problem:
    """Without a picture and without a hint: what everybody knows about shapes and letters."""
    del scene
    text, right, others = rng.choice(_FACTS)
    choices, answer = _mixed(right, others, rng, most=len(others))
    letters = others is LETTERS
    lecture = "Letters are put in an order." if letters else "Shapes are told apart by their sides and corners."
    solution = f"The answer is {right}."
    if letters:
        return Problem(text, choices, answer, "", lecture, solution, "language science", "vocabulary")
    return Problem(text, choices, answer, "", lecture, solution, "natural science", "physics")


KINDS_OF_PROBLEMS: Sequence[Callable[[Scene, random.Random], Problem]] = (place, context, appearance, knowledge)
WITH_IMAGE = (place, appearance)


def _mixed(right: str, pool: Sequence[str], rng: random.Random, *, most: int) -> tuple[tuple[str, ...], int]:
    """Two to ``most`` different choices in any order, and where the right one is."""
    wrong = [other for other in pool if other != right]
    choices = [right, *rng.sample(wrong, min(len(wrong), rng.randrange(1, most)))]
    rng.shuffle(choices)
    return tuple(choices), choices.index(right)


def _entry(problem: Problem, split: str, image: str | None) -> dict[str, Any]:
    return {
        "question": problem.question,
        "choices": list(problem.choices),
        "answer": problem.answer,
        "hint": problem.hint,
        "image": image,
        "task": "closed choice",
        "grade": "grade2",
        "subject": problem.subject,
        "topic": problem.topic,
        "category": problem.topic.replace("-", " ").capitalize(),
        "skill": "Identify drawn objects",
        "lecture": problem.lecture,
        "solution": problem.solution,
        "split": split,
    }
