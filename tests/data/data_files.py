"""Small files in the public formats, written for tests."""

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from aki_megatron.data.image import ImageCache
from aki_megatron.types import Modality

IMAGE_SIZE = 24
IMAGE_DECODERS = {Modality.IMAGE: ImageCache(IMAGE_SIZE, max_image_bytes=0)}
"""Decoders of a model that takes images only; nothing is kept from one test to the next."""


def image_bytes(shade: int = 0, *, form: str = "JPEG", size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade % 256, (7 * shade) % 256, 128)).save(buffer, format=form)
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def pairs(count: int, *, first: int = 0) -> list[tuple[str, bytes]]:
    """Return the members of complete caption samples."""
    return [
        member
        for number in range(first, first + count)
        for member in (
            (f"{number:06}.jpg", image_bytes(number)),
            (f"{number:06}.txt", f"The red cat {number}.\n".encode()),
        )
    ]


def _put(root: Path, name: str, content: Any) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_sources(root: Path, *, count: int = 12) -> None:
    """Write ``count`` samples of four fine-tuning sources, training split, in their original layout."""
    for image_id in range(1, count + 1):
        _put(root, f"VQA/train2014/COCO_train2014_{image_id:012d}.jpg", image_bytes(image_id))
        _put(root, f"A-OKVQA/train2017/{image_id:012d}.jpg", image_bytes(image_id))
        _put(root, f"vsr/val2017/{image_id:012d}.jpg", image_bytes(image_id))
    ids = range(1, count + 1)
    kinds = ("how many", "what color is the")
    questions = [{"image_id": i, "question_id": 10 * i, "question": f"How many cats {i}?"} for i in ids]
    annotations = [
        {
            "image_id": i,
            "question_id": 10 * i,
            "question_type": kinds[i % 2],
            "answer_type": "number",
            "multiple_choice_answer": str(i),
            "answers": [],
        }
        for i in reversed(ids)
    ]
    _put(
        root,
        "VQA/v2_OpenEnded_mscoco_train2014_questions.json",
        {"data_subtype": "train2014", "questions": questions},
    )
    _put(root, "VQA/v2_mscoco_train2014_annotations.json", {"data_subtype": "train2014", "annotations": annotations})
    lines = [
        {
            "image": f"{i:012d}.jpg",
            "image_link": f"http://images.example/{'train2017' if i % 2 else 'val2017'}/{i:012d}.jpg",
            "caption": f"The fish {i} is at the left side of the dish.",
            "label": i % 2,
        }
        for i in ids
    ]
    _put(root, "vsr/train-random.jsonl", "\n".join(json.dumps(line) for line in lines) + "\n")
    choices = [
        {
            "image_id": i,
            "question_id": f"q{i}",
            "question": "Which one is red?",
            "choices": ["bus", "cup", "tree", "clock"],
            "correct_choice_idx": i % 4,
        }
        for i in ids
    ]
    _put(root, "A-OKVQA/aokvqa_v1p0_train.json", choices)
    entries = [
        {
            "id": i,
            "file_name": f"COCO_train2014_{i:012d}.jpg",
            "width": 640,
            "height": 480,
            "caption": f"red cat {i}",
        }
        for i in ids
    ]
    boxes = [{"id": i, "image_id": i, "bbox": [64.0, 48.0, 160.0, 432.0]} for i in ids]
    _put(root, "ref/annotations/finetune_refcoco_train.json", {"images": entries, "annotations": boxes})
