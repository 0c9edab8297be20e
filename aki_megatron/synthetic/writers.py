"""Annotations and pictures in the public formats: VQAv2, VSR, A-OKVQA, the RefCOCOs (MDETR), webdataset tars.

Writers take finished rows and know nothing of how scenes are split. Every byte follows from the arguments: no clock,
no user name, no unordered container.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from aki_megatron.data.shard_writer import add_member
from aki_megatron.synthetic.questions import Choice, Question, Statement
from aki_megatron.synthetic.scenes import IMAGE_PIXELS, Pixels, SceneObject

ANNOTATORS = 10
"""Answers per VQAv2 question. The scenes leave no doubt, so all ten agree."""

_LICENSE = {"name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
_INFO = {"description": "Scenes drawn by aki-megatron's tools/make_data.py", "version": "1.0"}
_IMAGE_HOST = "http://drawn.invalid"
"""VSR's image_link is an address whose last two parts name the file; nothing is served there."""
_SHORT_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def encode_jpeg(pixels: Pixels) -> bytes:
    """A JPEG file of quality 95 whose colours are not subsampled (4:4:4): the objects are a few pixels wide."""
    return _encode(pixels, format="JPEG", quality=95, subsampling=0)


def encode_png(pixels: Pixels) -> bytes:
    """A PNG file."""
    return _encode(pixels, format="PNG", compress_level=1)


def _encode(pixels: Pixels, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def write_tar(path: Path, samples: Iterable[tuple[str, str, bytes, str]]) -> None:
    """A webdataset shard of (key, image extension, image bytes, text): two members per key, image first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, extension, image, text in samples:
            add_member(tar, f"{key}.{extension}", image)
            add_member(tar, f"{key}.txt", text.encode())


def write_vqav2(folder: Path, subtype: str, rows: Sequence[tuple[int, Sequence[Question]]]) -> list[Path]:
    """The question and the annotation file of one subset, train2014 or val2014, from rows of (image id, questions).

    question_type holds the name of the task.
    """
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, asked in rows:
        for number, question in enumerate(asked):
            question_id = image_id * 1000 + number  # as in VQAv2
            questions.append({"image_id": image_id, "question": question.text, "question_id": question_id})
            answers = [
                {"answer": question.answer, "answer_confidence": "yes", "answer_id": annotator}
                for annotator in range(1, ANNOTATORS + 1)
            ]
            annotations.append(
                {
                    "question_type": question.task,
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                    "image_id": image_id,
                    "answer_type": question.answer_type,
                    "question_id": question_id,
                }
            )
    head = {"info": _INFO, "license": _LICENSE, "data_type": "mscoco", "data_subtype": subtype}
    return [
        write_json(
            folder / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
            {**head, "task_type": "Open-Ended", "questions": questions},
        ),
        write_json(folder / f"v2_mscoco_{subtype}_annotations.json", {**head, "annotations": annotations}),
    ]


def write_vsr(path: Path, subset: str, rows: Sequence[tuple[int, Sequence[Statement]]]) -> Path:
    """A VSR file, one JSON object per line; ``subset`` (train2017, val2017) is where image_link says the image lies."""
    lines = []
    for image_id, statements in rows:
        image = f"{image_id:012}.jpg"
        for statement in statements:
            line = {
                "image": image,
                "image_link": f"{_IMAGE_HOST}/{subset}/{image}",
                "caption": statement.text,
                "label": int(statement.true),
                "relation": statement.relation,
                "annotator_id": 1,
                "vote_true_validator_id": [2, 3] if statement.true else [],
                "vote_false_validator_id": [] if statement.true else [2, 3],
            }
            lines.append(json.dumps(line))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_aokvqa(path: Path, split: str, rows: Sequence[tuple[int, Sequence[Choice]]]) -> Path:
    """An A-OKVQA file of one split (train or val)."""
    entries = []
    for image_id, choices in rows:
        for number, choice in enumerate(choices):
            answer = choice.options[choice.correct]
            entries.append(
                {
                    "split": split,
                    "image_id": image_id,
                    "question_id": _short_id(f"{split}/{image_id}/{number}"),
                    "question": choice.text,
                    "choices": list(choice.options),
                    "correct_choice_idx": choice.correct,
                    "direct_answers": [answer] * ANNOTATORS,
                    "difficult_direct_answer": False,
                    "rationales": [f"The object there is the {answer}."] * 3,
                }
            )
    return write_json(path, entries)


def write_refcoco(
    path: Path, rows: Sequence[tuple[int, str, Sequence[tuple[SceneObject, str]]]], dataset: str = "refcoco"
) -> Path:
    """A RefCOCO file in MDETR's layout from (image id, file name, objects with their phrases).

    There is an image entry per phrase; annotations are paired with them by order. ``dataset`` is the dataset_name.

    The box is the object's cell, not its outline: nine boxes with round corners, which a model of this size learns in
    minutes; the outlines' jitter of two pixels would spread the same nine regions over hundreds of corner pairs.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, file_name, things in rows:
        for thing, phrase in things:
            number = len(images)
            _, _, width, height = thing.cell_box
            images.append(
                {
                    "file_name": file_name,
                    "height": IMAGE_PIXELS,
                    "width": IMAGE_PIXELS,
                    "id": number,
                    "original_id": image_id,
                    "caption": phrase,
                    "dataset_name": dataset,
                }
            )
            annotations.append(
                {
                    "area": width * height,
                    "iscrowd": 0,
                    "image_id": number,
                    "category_id": 1,
                    "id": number,
                    "bbox": list(thing.cell_box),
                    "original_id": number,
                    "tokens_positive": [[0, len(phrase)]],
                }
            )
    categories = [{"supercategory": "object", "id": 1, "name": "object"}]
    content = {"info": _INFO, "licenses": [_LICENSE], "images": images, "annotations": annotations}
    return write_json(path, {**content, "categories": categories})


def write_json(path: Path, content: object) -> Path:
    """Compact JSON, keys in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")))
    return path


def _short_id(text: str) -> str:
    """22 characters, as A-OKVQA's question ids."""
    number, digits = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"), []
    for _ in range(22):
        number, digit = divmod(number, len(_SHORT_ALPHABET))
        digits.append(_SHORT_ALPHABET[digit])
    return "".join(digits)
