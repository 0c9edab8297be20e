"""Visual Genome (https://homes.cs.washington.edu/~ranjay/visualgenome): phrases for regions of images of its own.

region_descriptions.json, a list of images with their regions, and image_data.json with the sizes.
"""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aki_megatron.synthetic.files import IMAGE_HOST, write_json
from aki_megatron.synthetic.questions import RELATIONS, holds, sample_objects
from aki_megatron.synthetic.scene_pools import SyntheticExample
from aki_megatron.synthetic.scenes import IMAGE_PIXELS, Scene, SceneObject

IMAGES = "VisualGenome/images"
_REGIONS_PER_SCENE = 4


def write(root: Path, examples: Iterable[SyntheticExample]) -> dict[str, int]:
    """Write region_descriptions.json, image_data.json and the images; return the number of regions."""
    descriptions: list[dict[str, Any]] = []
    image_data: list[dict[str, Any]] = []
    count = 0
    for image, example in enumerate(examples, start=1):
        (root / IMAGES / f"{image}.jpg").write_bytes(example.encode_image("jpg"))
        regions = [
            {"region_id": region, "width": w, "height": h, "image_id": image, "phrase": phrase, "y": y, "x": x}
            for region, (phrase, (x, y, w, h)) in enumerate(
                region_phrases(example.scene, example.text_rng), start=count + 1
            )
        ]
        count += len(regions)
        descriptions.append({"regions": regions, "id": image})
        size = {"width": IMAGE_PIXELS, "url": f"{IMAGE_HOST}/VG_100K/{image}.jpg", "height": IMAGE_PIXELS}
        image_data.append({**size, "image_id": image, "coco_id": None, "flickr_id": None})
    write_json(root / "VisualGenome/region_descriptions.json", descriptions)
    write_json(root / "VisualGenome/image_data.json", image_data)
    return {"train/vg": count}


def region_phrases(scene: Scene, rng: random.Random) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Return (phrase, box) of a few single objects and of one pair, whose box encloses both."""
    found = []
    for item in sample_objects(scene, rng, max_objects=_REGIONS_PER_SCENE - 1):
        phrases = (
            f"a {item.phrase}",
            f"the {item.kind_phrase} is {item.color}",
            f"{item.phrase} on grey ground",
        )
        found.append((rng.choice(phrases), item.cell_box))
    first, second = rng.sample(scene.objects, 2)
    relation = rng.choice([name for name in RELATIONS if holds(name, first, second)])
    found.append((f"{first.phrase} {relation} {second.phrase}", _enclosing_box(first, second)))
    return found


def _enclosing_box(first: SceneObject, second: SceneObject) -> tuple[int, int, int, int]:
    boxes = (first.cell_box, second.cell_box)
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return left, top, right - left, bottom - top
