"""RefCOCO, RefCOCO+ and RefCOCOg in MDETR's format (https://github.com/ashkamath/mdetr): phrases for boxes.

RefCOCO+ forbids words of location; RefCOCOg's phrases are longer and relate an object to another one. All three show
images of the captions' scenes.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from aki_megatron.synthetic.files import COCO_INFO, COCO_LICENSE, write_json
from aki_megatron.synthetic.questions import RELATIONS, holds, sample_objects
from aki_megatron.synthetic.scene_pools import SyntheticExample, image_id
from aki_megatron.synthetic.scenes import IMAGE_PIXELS, LETTERS, Scene, SceneObject

Region = tuple[SceneObject, str]
"""An object and the phrase that refers to it."""

_PHRASES_PER_SCENE = 2


def write(path: Path, annotated: Sequence[tuple[int, str, Sequence[Region]]], dataset: str = "refcoco") -> None:
    """Write one file from (image id, file name, regions); ``dataset`` is the dataset_name.

    There is an image entry per phrase; annotations are paired with them by order.

    The box is the object's cell, not its outline: nine boxes with round corners, which a model of this size learns in
    minutes; the outlines' jitter of two pixels would spread the same nine regions over hundreds of corner pairs.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number_of_image, file_name, regions in annotated:
        for item, phrase in regions:
            entry_id = len(images)
            _, _, width, height = item.cell_box
            images.append(
                {
                    "file_name": file_name,
                    "height": IMAGE_PIXELS,
                    "width": IMAGE_PIXELS,
                    "id": entry_id,
                    "original_id": number_of_image,
                    "caption": phrase,
                    "dataset_name": dataset,
                }
            )
            annotations.append(
                {
                    "area": width * height,
                    "iscrowd": 0,
                    "image_id": entry_id,
                    "category_id": 1,
                    "id": entry_id,
                    "bbox": list(item.cell_box),
                    "original_id": entry_id,
                    "tokens_positive": [[0, len(phrase)]],
                }
            )
    categories = [{"supercategory": "object", "id": 1, "name": "object"}]
    content = {"info": COCO_INFO, "licenses": [COCO_LICENSE], "images": images, "annotations": annotations}
    write_json(path, {**content, "categories": categories})


def coco_file_name(split: str, index: int, extension: str) -> str:
    """Return the name of a caption scene's image in VQA/train2014, where RefCOCO's images of both splits are."""
    return f"COCO_train2014_{image_id(split, index):012}.{extension}"


def appearance_phrase(scene: Scene, item: SceneObject, rng: random.Random) -> str:
    """Name an object of a scene by its appearance, never by its location (RefCOCO+)."""
    phrases = [item.phrase, f"{item.kind_phrase} in {item.color}"]
    if item in scene.objects_of_unique_kind:
        phrases.append(f"the only {item.kind_phrase}")
    if sum(other.color == item.color for other in scene.objects) == 1:
        phrases.append(f"the only {item.color} object")
    if item.kind in LETTERS and sum(other.kind in LETTERS for other in scene.objects) == 1:
        phrases.append("the only letter")
    return rng.choice(phrases)


def relational_phrase(scene: Scene, item: SceneObject, rng: random.Random) -> str:
    """Describe an object at length: what it is, where, and its relation to another one (RefCOCOg)."""
    other = rng.choice([candidate for candidate in scene.objects if candidate is not item])
    relation = rng.choice([name for name in RELATIONS if holds(name, item, other)])
    return rng.choice(
        [
            f"the {item.phrase} at the {item.cell_name} of the picture, {relation} the {other.phrase}",
            f"a {item.kind_phrase} painted {item.color} that stands {relation} the {other.phrase}",
        ]
    )


PHRASES: dict[str, Callable[[Scene, SceneObject, random.Random], str]] = {
    "refcoco+": appearance_phrase,
    "refcocog": relational_phrase,
}
"""dataset_name in MDETR's files -> how a region is described."""


def _write_examples(dataset: str, root: Path, examples: Iterable[SyntheticExample]) -> dict[str, int]:
    annotated: dict[str, list[tuple[int, str, list[Region]]]] = {"train": [], "val": []}
    for example in examples:
        objects = sample_objects(example.scene, example.text_rng, max_objects=_PHRASES_PER_SCENE)
        regions = [(item, PHRASES[dataset](example.scene, item, example.text_rng)) for item in objects]
        file_name = coco_file_name(example.split, example.index, example.extension)
        annotated[example.split].append((image_id(example.split, example.index), file_name, regions))
    for split, of_split in annotated.items():
        write(root / f"ref/annotations/finetune_{dataset}_{split}.json", of_split, dataset)
    return {f"{split}/{dataset}": sum(len(regions) for *_, regions in rows) for split, rows in annotated.items()}


write_refcoco_plus = partial(_write_examples, "refcoco+")
write_refcocog = partial(_write_examples, "refcocog")
