"""LLaVA-Instruct-150K (https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K): conversations about images.

A list of id, image and ``conversations``, in which human and gpt alternate; the first human turn holds ``<image>`` on
a line of its own, before or after the text. As in the original there are dialogues, detailed descriptions and
questions that need reasoning. The images are those of A-OKVQA's train2017.
"""

import random
from collections.abc import Iterable
from pathlib import Path

from aki_megatron.synthetic.files import write_json
from aki_megatron.synthetic.questions import sample_statement
from aki_megatron.synthetic.scene_pools import SyntheticExample, image_id
from aki_megatron.synthetic.scenes import COLORS, KINDS, LETTERS, Scene, SceneObject

_MAX_ROUNDS = 5
Round = tuple[str, str]
"""The human's text and gpt's reply."""


def write(root: Path, examples: Iterable[SyntheticExample]) -> dict[str, int]:
    """Write llava_instruct_150k.json; return the number of conversations."""
    entries = []
    for example in examples:
        image = f"{image_id(example.split, example.index):012}"
        turns = []
        for number, (text, reply) in enumerate(sample_rounds(example.scene, example.text_rng)):
            if number == 0:
                text = f"<image>\n{text}" if example.text_rng.random() < 0.5 else f"{text}\n<image>"
            turns += [{"from": "human", "value": text}, {"from": "gpt", "value": reply}]
        entries.append({"id": image, "image": f"{image}.jpg", "conversations": turns})
    write_json(root / "llava/llava_instruct_150k.json", entries)
    return {"train/llava": len(entries)}


def sample_rounds(scene: Scene, rng: random.Random) -> list[Round]:
    """Return a dialogue of two to five rounds, or one round that describes or explains."""
    kind = rng.choice(("dialogue", "detail", "reasoning"))
    if kind == "detail":
        return [_description(scene)]
    if kind == "reasoning":
        return [_reasoning(scene, rng)]
    replies: dict[str, str] = {}
    num_rounds = rng.randrange(2, _MAX_ROUNDS + 1)
    while len(replies) < num_rounds:
        question, reply = rng.choice(_DIALOGUE_QUESTIONS)(scene, rng)
        replies[question] = reply
    return list(replies.items())


def _description(scene: Scene) -> Round:
    sentences = [f"The picture shows {len(scene.objects)} objects."]
    sentences += [f"At the {item.cell_name} there is a {item.phrase}." for item in scene.objects]
    return "What do you see in the picture? Describe it in detail.", " ".join(sentences)


def _reasoning(scene: Scene, rng: random.Random) -> Round:
    """Ask whether there are more shapes or more letters; the counts are the reason."""
    letters = sum(item.kind in LETTERS for item in scene.objects)
    shapes = len(scene.objects) - letters
    names = ["shapes", "letters"]
    rng.shuffle(names)
    more = "as many shapes as" if shapes == letters else "more shapes than" if shapes > letters else "fewer shapes than"
    because = f"because {shapes} of the {len(scene.objects)} objects are shapes and {letters} are letters"
    return f"Are there more {names[0]} or more {names[1]}, and why?", f"There are {more} letters, {because}."


def _count(scene: Scene, rng: random.Random) -> Round:
    del rng
    return "How many objects are there in the picture?", f"There are {len(scene.objects)} objects in the picture."


def _color(scene: Scene, rng: random.Random) -> Round:
    if not (unique := scene.objects_of_unique_kind):
        return _location(scene, rng)
    item = rng.choice(unique)
    return f"What color is the {item.kind_phrase}?", f"The {item.kind_phrase} is {item.color}."


def _location(scene: Scene, rng: random.Random) -> Round:
    item = rng.choice(scene.objects)
    return f"Where is the {item.phrase}?", f"The {item.phrase} is at the {item.cell_name} of the picture."


def _existence(scene: Scene, rng: random.Random) -> Round:
    item = SceneObject(rng.choice(KINDS), rng.choice(COLORS), 0, 0)
    if rng.random() < 0.5:
        item = rng.choice(scene.objects)
    present = next((other for other in scene.objects if other.name == item.name), None)
    question = f"Is there a {item.phrase} in the picture?"
    if present:
        return question, f"Yes, there is a {present.phrase} at the {present.cell_name}."
    return question, f"No, there is no {item.phrase} in the picture."


def _relation(scene: Scene, rng: random.Random) -> Round:
    statement = sample_statement(scene, rng)
    text = statement.text.removeprefix("The ").removesuffix(".").replace(" is ", " ", 1)
    return f"Is the {text}?", f"{'Yes, it is' if statement.true else 'No, it is not'} {statement.relation} it."


_DIALOGUE_QUESTIONS = (_count, _color, _location, _existence, _relation)
