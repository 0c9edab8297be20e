"""ScienceQA (https://scienceqa.github.io): multiple choice, half of it without an image, with and without a hint.

problems.json, id -> question, choices, answer (index), hint, image (name or null), lecture, solution, split and the
topic in the curriculum; pid_splits.json; images/{split}/{id}/image.png.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.synthetic.files import write_json
from aki_megatron.synthetic.questions import neighbor_question, sample_multiple_choice, scene_caption
from aki_megatron.synthetic.scene_pools import SyntheticExample
from aki_megatron.synthetic.scenes import COLORS, LETTERS, MAX_OBJECTS, MIN_OBJECTS, SHAPES, Scene

SPLITS = ("train", "val", "test")
IMAGES = tuple(f"ScienceQA/images/{split}" for split in SPLITS)
IMAGE_FILE = "image.png"
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
    """A question with its choices; ``answer`` is an index, ``subject`` one of ScienceQA's three."""

    question: str
    choices: tuple[str, ...]
    answer: int
    hint: str
    lecture: str
    solution: str
    subject: str
    topic: str


def write(root: Path, examples: Iterable[SyntheticExample]) -> dict[str, int]:
    """Write problems.json, pid_splits.json and the images; return the number of problems by ``split/scienceqa``."""
    problems: dict[str, Any] = {}
    ids: dict[str, list[str]] = {split: [] for split in SPLITS}
    for example in examples:
        problem_id = str(len(problems) + 1)
        kind = PROBLEM_KINDS[example.index % len(PROBLEM_KINDS)]
        has_image = kind in KINDS_WITH_IMAGE
        problem = kind(example.scene, example.text_rng)
        problems[problem_id] = _entry(problem, example.split, IMAGE_FILE if has_image else None)
        ids[example.split].append(problem_id)
        if has_image:
            folder = root / "ScienceQA/images" / example.split / problem_id
            folder.mkdir(parents=True)
            (folder / IMAGE_FILE).write_bytes(example.encode_image("png"))
    write_json(root / "ScienceQA/problems.json", problems)
    write_json(root / "ScienceQA/pid_splits.json", {**ids, "trainval": ids["train"] + ids["val"]})
    return {f"{split}/scienceqa": len(of_split) for split, of_split in ids.items()}


def location_problem(scene: Scene, rng: random.Random) -> Problem:
    """Ask with an image and a hint: which object is in a cell."""
    question = sample_multiple_choice(scene, rng)
    hint = f"The picture shows {len(scene.objects)} objects on a grid of three rows and three columns."
    lecture = "A place on a grid is named by its row and its column."
    answer = question.options[question.correct]
    solution = f"Look at the place that is named. The object there is the {answer}."
    return Problem(
        question.text, question.options, question.correct, hint, lecture, solution, "social science", "geography"
    )


def appearance_problem(scene: Scene, rng: random.Random) -> Problem:
    """Ask with an image, without a hint: the colour of an object, or how many there are if no kind occurs once."""
    lecture = "An object can be described by properties such as its color and its shape."
    if unique := scene.objects_of_unique_kind:
        item = rng.choice(unique)
        choices, answer = _sample_choices(item.color, COLORS, rng, max_choices=len(COLORS))
        text, solution = f"What color is the {item.kind_phrase}?", f"The {item.kind_phrase} is {item.color}."
    else:
        number = str(len(scene.objects))
        numbers = [str(count) for count in range(MIN_OBJECTS, MAX_OBJECTS + 1)]
        choices, answer = _sample_choices(number, numbers, rng, max_choices=len(numbers))
        text, solution = "How many objects are there?", f"Count them one by one: there are {number}."
    return Problem(text, choices, answer, "", lecture, solution, "natural science", "physics")


def context_problem(scene: Scene, rng: random.Random) -> Problem:
    """Ask without an image: the hint describes the scene in words."""
    hint = f"These objects lie on a grid: {scene_caption(scene)}"
    lecture = "A text can say where things are. Read it step by step."
    if open_question := neighbor_question(scene, rng):
        text, correct = open_question.text, open_question.answer
        choices, answer = _sample_choices(correct, [item.name for item in scene.objects], rng, max_choices=3)
    else:
        question = sample_multiple_choice(scene, rng)
        text, choices, answer = question.text, question.options, question.correct
        correct = choices[answer]
    solution = f"Read the hint. It is the {correct}."
    return Problem(text, choices, answer, hint, lecture, solution, "language science", "reading-comprehension")


def knowledge_problem(scene: Scene, rng: random.Random) -> Problem:
    """Ask without an image and without a hint: a fact about shapes or letters."""
    del scene
    text, correct, candidates = rng.choice(_FACTS)
    choices, answer = _sample_choices(correct, candidates, rng, max_choices=len(candidates))
    solution = f"The answer is {correct}."
    if candidates is LETTERS:
        lecture = "Letters are put in an order."
        return Problem(text, choices, answer, "", lecture, solution, "language science", "vocabulary")
    lecture = "Shapes are told apart by their sides and corners."
    return Problem(text, choices, answer, "", lecture, solution, "natural science", "physics")


PROBLEM_KINDS: Sequence[Callable[[Scene, random.Random], Problem]] = (
    *(location_problem, context_problem, appearance_problem, knowledge_problem),
)
KINDS_WITH_IMAGE = (location_problem, appearance_problem)


def _sample_choices(
    correct: str, candidates: Sequence[str], rng: random.Random, *, max_choices: int
) -> tuple[tuple[str, ...], int]:
    """Return two to ``max_choices`` different choices in random order, and the index of the correct one."""
    wrong = [other for other in candidates if other != correct]
    choices = [correct, *rng.sample(wrong, min(len(wrong), rng.randrange(1, max_choices)))]
    rng.shuffle(choices)
    return tuple(choices), choices.index(correct)


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
