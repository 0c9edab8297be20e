"""RefCOCO+, RefCOCOg and Visual Genome: phrases for regions of drawn scenes.

RefCOCO+ forbids words of location; RefCOCOg's phrases are longer and speak of neighbours; both come in MDETR's
layout and show pictures that exist. Visual Genome (https://homes.cs.washington.edu/~ranjay/visualgenome) has pictures
of its own: region_descriptions.json, a list of images with their regions, and image_data.json with the sizes.
"""

import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from aki_megatron.synthetic import questions as ask
from aki_megatron.synthetic.scene_pools import Drawn, alone, described, image_id, noun
from aki_megatron.synthetic.scenes import IMAGE_PIXELS, LETTERS, Scene, SceneObject
from aki_megatron.synthetic.writers import write_json, write_refcoco

IMAGES = "VisualGenome/images"
_PHRASES_PER_SCENE = 2
_REGIONS_PER_SCENE = 4
_HOST = "http://drawn.invalid/VG_100K"


def appearance(scene: Scene, thing: SceneObject, rng: random.Random) -> str:
    """A phrase that names one object of a scene by how it looks, never by where it is (RefCOCO+)."""
    phrases = [described(thing), f"{noun(thing)} in {thing.color}"]
    if thing in alone(scene):
        phrases.append(f"the only {noun(thing)}")
    if sum(other.color == thing.color for other in scene.objects) == 1:
        phrases.append(f"the only {thing.color} object")
    if thing.kind in LETTERS and sum(other.kind in LETTERS for other in scene.objects) == 1:
        phrases.append("the only letter")
    return rng.choice(phrases)


def neighbourhood(scene: Scene, thing: SceneObject, rng: random.Random) -> str:
    """A whole sentence's worth about one object: what it is, where, and how it stands to another (RefCOCOg)."""
    other = rng.choice([one for one in scene.objects if one is not thing])
    relation = rng.choice([name for name in ask.RELATIONS if ask.holds(name, thing, other)])
    return rng.choice(
        [
            f"the {described(thing)} at the {thing.place} of the picture, {relation} the {described(other)}",
            f"a {noun(thing)} painted {thing.color} that stands {relation} the {described(other)}",
        ]
    )


PHRASES: dict[str, Callable[[Scene, SceneObject, random.Random], str]] = {
    "refcoco+": appearance,
    "refcocog": neighbourhood,
}
"""dataset_name of MDETR -> how a region is phrased."""


def _write_expressions(dataset: str, root: Path, drawn: Iterable[Drawn]) -> dict[str, int]:
    rows: dict[str, list[tuple[int, str, list[tuple[SceneObject, str]]]]] = {"train": [], "val": []}
    for one in drawn:
        things = ask.regions(one.scene, one.words, most=_PHRASES_PER_SCENE)
        phrases = [(thing, PHRASES[dataset](one.scene, thing, one.words)) for thing in things]
        number = image_id(one.split, one.number)
        rows[one.split].append((number, f"COCO_train2014_{number:012}.{one.extension}", phrases))
    for split, found in rows.items():
        write_refcoco(root / f"ref/annotations/finetune_{dataset}_{split}.json", found, dataset)
    return {f"{split}/{dataset}": sum(len(phrases) for *_, phrases in found) for split, found in rows.items()}


write_refcoco_plus = partial(_write_expressions, "refcoco+")
write_refcocog = partial(_write_expressions, "refcocog")


def write_genome(root: Path, drawn: Iterable[Drawn]) -> dict[str, int]:
    """Write region_descriptions.json, image_data.json and the pictures; returns the number of regions."""
    regions: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    count = 0
    for number, one in enumerate(drawn, start=1):
        (root / IMAGES / f"{number}.jpg").write_bytes(one.picture("jpg"))
        found = [
            {"region_id": count + at, "width": w, "height": h, "image_id": number, "phrase": text, "y": y, "x": x}
            for at, (text, (x, y, w, h)) in enumerate(genome_regions(one.scene, one.words), start=1)
        ]
        count += len(found)
        regions.append({"regions": found, "id": number})
        size = {"width": IMAGE_PIXELS, "url": f"{_HOST}/{number}.jpg", "height": IMAGE_PIXELS}
        images.append({**size, "image_id": number, "coco_id": None, "flickr_id": None})
    write_json(root / "VisualGenome/region_descriptions.json", regions)
    write_json(root / "VisualGenome/image_data.json", images)
    return {"train/vg": count}


def genome_regions(scene: Scene, rng: random.Random) -> list[tuple[str, tuple[int, int, int, int]]]:
    """(phrase, box) of a few single objects and of one pair, whose box is around both."""
    found = []
    for thing in ask.regions(scene, rng, most=_REGIONS_PER_SCENE - 1):
        phrases = (f"a {described(thing)}", f"the {noun(thing)} is {thing.color}", f"{described(thing)} on grey ground")
        found.append((rng.choice(phrases), thing.cell_box))
    first, second = rng.sample(scene.objects, 2)
    relation = rng.choice([name for name in ask.RELATIONS if ask.holds(name, first, second)])
    found.append((f"{described(first)} {relation} {described(second)}", _around(first, second)))
    return found


def _around(first: SceneObject, second: SceneObject) -> tuple[int, int, int, int]:
    boxes = (first.cell_box, second.cell_box)
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return left, top, right - left, bottom - top
