"""LLaVA-Instruct-150k: conversations about pictures of A-OKVQA's train2017.

https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K: a list of id, image and ``conversations``, in which
human and gpt alternate; the first human turn holds ``<image>`` on a line of its own, before or behind the words.
As in the original there are dialogues, detailed descriptions and questions that need a thought.
"""

import random
from collections.abc import Iterable
from pathlib import Path

from aki_megatron.synthetic import questions as ask
from aki_megatron.synthetic.scene_pools import Drawn, alone, described, image_id, noun
from aki_megatron.synthetic.scenes import COLORS, KINDS, LETTERS, Scene, SceneObject
from aki_megatron.synthetic.writers import write_json

_MOST_ROUNDS = 5
Round = tuple[str, str]
"""What the human says and what gpt answers."""


def write(root: Path, drawn: Iterable[Drawn]) -> dict[str, int]:
    """Write llava_instruct_150k.json; returns the number of conversations."""
    entries = []
    for one in drawn:
        number = f"{image_id(one.split, one.number):012}"
        turns = []
        for at, (said, answered) in enumerate(rounds(one.scene, one.words)):
            if at == 0:
                said = f"<image>\n{said}" if one.words.random() < 0.5 else f"{said}\n<image>"
            turns += [{"from": "human", "value": said}, {"from": "gpt", "value": answered}]
        entries.append({"id": number, "image": f"{number}.jpg", "conversations": turns})
    write_json(root / "llava/llava_instruct_150k.json", entries)
    return {"train/llava": len(entries)}


def rounds(scene: Scene, rng: random.Random) -> list[Round]:
    """A dialogue of two to five rounds, or one round that describes or explains."""
    kind = rng.choice(("dialogue", "detail", "reasoning"))
    if kind == "detail":
        return [describe(scene)]
    if kind == "reasoning":
        return [reason(scene, rng)]
    asked: dict[str, str] = {}
    wanted = rng.randrange(2, _MOST_ROUNDS + 1)
    while len(asked) < wanted:
        question, answer = rng.choice(_ASKS)(scene, rng)
        asked[question] = answer
    return list(asked.items())


def describe(scene: Scene) -> Round:
    """Everything that is there."""
    sentences = [f"The picture shows {len(scene.objects)} objects."]
    sentences += [f"At the {thing.place} there is a {described(thing)}." for thing in scene.objects]
    return "What do you see in the picture? Describe it in detail.", " ".join(sentences)


def reason(scene: Scene, rng: random.Random) -> Round:
    """Whether there are more shapes or more letters, with the counts as the reason."""
    letters = sum(thing.kind in LETTERS for thing in scene.objects)
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
    if not (things := alone(scene)):
        return _where(scene, rng)
    thing = rng.choice(things)
    return f"What color is the {noun(thing)}?", f"The {noun(thing)} is {thing.color}."


def _where(scene: Scene, rng: random.Random) -> Round:
    thing = rng.choice(scene.objects)
    return f"Where is the {described(thing)}?", f"The {described(thing)} is at the {thing.place} of the picture."


def _exist(scene: Scene, rng: random.Random) -> Round:
    thing = SceneObject(rng.choice(KINDS), rng.choice(COLORS), 0, 0)
    if rng.random() < 0.5:
        thing = rng.choice(scene.objects)
    found = next((one for one in scene.objects if one.name == thing.name), None)
    asked = f"Is there a {described(thing)} in the picture?"
    if found:
        return asked, f"Yes, there is a {described(found)} at the {found.place}."
    return asked, f"No, there is no {described(thing)} in the picture."


def _relation(scene: Scene, rng: random.Random) -> Round:
    drawn = ask.statement(scene, rng)
    asked = drawn.text.removeprefix("The ").removesuffix(".").replace(" is ", " ", 1)
    return f"Is the {asked}?", f"{'Yes, it is' if drawn.true else 'No, it is not'} {drawn.relation} it."


_ASKS = (_count, _color, _where, _exist, _relation)
