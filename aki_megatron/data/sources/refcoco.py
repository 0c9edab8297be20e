"""RefCOCO, RefCOCO+ and RefCOCOg in MDETR's format: describe the region of a box. https://github.com/ashkamath/mdetr"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.boxes import PROMPT, box_corners, corners_text
from aki_megatron.data.sources.json_stream import JsonLocation, iter_object_arrays
from aki_megatron.data.sources.records import (
    DatasetReader,
    LazyConversations,
    PackedRecords,
    data_errors,
    parse_entries,
    safe_path,
    text_field,
)
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation, Turn


class _Image(NamedTuple):
    """One element of ``images``: MDETR repeats the image for every phrase."""

    entry_id: int
    file_name: str
    width: float
    height: float
    phrase: str


class _Phrase(NamedTuple):
    entry_id: int
    file_name: str
    corners: list[float]
    phrase: str


def files(variant: str) -> dict[str, tuple[str, ...]]:
    """Return split -> annotation file and image folder."""
    return {
        split: (f"ref/annotations/finetune_{variant}_{split}.json", "VQA/train2014")
        for split in ("train", "val")  # every split uses images of COCO's train2014
    }


def read(variant: str, root: Path, split: str) -> Sequence[Conversation]:
    """Read one sample per referring phrase: the box is given, the phrase is the answer."""
    file, folder = (root / name for name in files(variant)[split])
    images: list[_Image] = []
    annotations: list[tuple[int, list[float]]] = []
    for record in parse_entries(file, iter_object_arrays(file, "images", "annotations"), _parse, id_field="id"):
        if isinstance(record, _Image):
            images.append(record)
        else:
            annotations.append(record)
    if len(images) != len(annotations):
        raise DataError(
            f"{file}: {len(images)} images but {len(annotations)} annotations; they are paired by order (MDETR)."
        )
    phrases = PackedRecords(_pair(file, images, annotations), _Phrase._make)
    return LazyConversations(phrases, partial(_conversation, folder, variant))


def _conversation(folder: Path, variant: str, phrase: _Phrase) -> Conversation:
    key = f"{variant}/region/{phrase.entry_id}"
    turn = Turn(PROMPT.format(box=corners_text(phrase.corners)), phrase.phrase)
    return Conversation(key, (turn,), safe_path(folder, phrase.file_name, key=key))


def _parse(location: JsonLocation, entry: Any) -> Iterator[_Image | tuple[int, list[float]]]:
    if location.name == "images":
        width, height = float(entry["width"]), float(entry["height"])
        yield _Image(int(entry["id"]), text_field(entry, "file_name"), width, height, text_field(entry, "caption"))
    elif location.name == "annotations":
        x, y, width, height = (float(number) for number in entry["bbox"])
        yield int(entry["image_id"]), [x, y, width, height]


def _pair(file: Path, images: list[_Image], annotations: list[tuple[int, list[float]]]) -> Iterator[_Phrase]:
    image: _Image | None = None
    with data_errors(lambda: f"{file}, id {image.entry_id if image else None}"):
        for image, (image_id, xywh) in zip(images, annotations, strict=True):
            if image_id != image.entry_id:
                raise ValueError(f"images entry {image.entry_id} stands beside an annotation of image_id {image_id}")
            corners = list(box_corners(xywh, image.width, image.height))
            yield _Phrase(image.entry_id, image.file_name, corners, image.phrase)


REFCOCO, REFCOCO_PLUS, REFCOCOG = (
    DatasetReader(files(variant), partial(read, variant)) for variant in ("refcoco", "refcoco+", "refcocog")
)
