"""RefCOCO, RefCOCO+ and RefCOCOg in MDETR's format: describe the region of a box. https://github.com/ashkamath/mdetr"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.boxes import PROMPT, box_corners, corners_text
from aki_megatron.data.sources.json_stream import JsonLocation, iter_object_arrays
from aki_megatron.data.sources.records import (
    MALFORMED,
    DatasetReader,
    LazyConversations,
    PackedRecords,
    Record,
    as_int,
    as_list,
    describe_entry,
    error_reason,
    safe_path,
    text_field,
)
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation, Turn, image_items


class _Image(NamedTuple):
    """One element of ``images``: MDETR repeats the image for every phrase."""

    entry_id: int
    file_name: str
    width: float
    height: float
    phrase: str


class _Box(NamedTuple):
    """One element of ``annotations``."""

    image_id: int
    xywh: list[float]


class _Fault(NamedTuple):
    """An element that cannot be used: where it is, and why."""

    location: str
    reason: str


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


def read(variant: str, root: Path, split: str) -> LazyConversations[_Phrase]:
    """Read one sample per referring phrase: the box is given, the phrase is the answer. Boxes are clipped to the image.

    The two arrays of the file are paired by order; a pair is left out where either of the two cannot be used.
    """
    file, folder = (root / name for name in files(variant)[split])
    faults = FaultCounts()
    images: list[_Image | _Fault] = []
    boxes: list[_Box | _Fault] = []
    for location, entry in iter_object_arrays(file, "images", "annotations"):
        if location.name == "images":
            images.append(_parsed(_parse_image, file, location, entry))
        elif location.name == "annotations":
            boxes.append(_parsed(_parse_box, file, location, entry))
    if len(images) != len(boxes):
        raise DataError(f"{file}: {len(images)} images but {len(boxes)} annotations; they are paired by order (MDETR).")
    phrases = PackedRecords(_pair(file, images, boxes, faults), _Phrase._make)
    return LazyConversations(phrases, partial(_conversation, folder, variant), faults)


def _conversation(folder: Path, variant: str, phrase: _Phrase) -> Conversation:
    key = f"{variant}/region/{phrase.entry_id}"
    turn = Turn(PROMPT.format(box=corners_text(phrase.corners)), phrase.phrase)
    return Conversation(key, (turn,), image_items(safe_path(folder, phrase.file_name, key=key)))


def _parsed(parse: Callable[[Any], Record], file: Path, location: JsonLocation, entry: Any) -> Record | _Fault:
    """Return what ``parse`` makes of an entry, or what is wrong with it."""
    try:
        return parse(entry)
    except MALFORMED as error:
        return _Fault(describe_entry(file, location, entry, "id"), error_reason(error))


def _parse_image(entry: Any) -> _Image:
    width, height = float(entry["width"]), float(entry["height"])
    return _Image(
        as_int(entry["id"], "id"), text_field(entry, "file_name"), width, height, text_field(entry, "caption")
    )


def _parse_box(entry: Any) -> _Box:
    x, y, width, height = (float(number) for number in as_list(entry["bbox"], "bbox"))
    return _Box(as_int(entry["image_id"], "image_id"), [x, y, width, height])


def _pair(
    file: Path, images: list[_Image | _Fault], boxes: list[_Box | _Fault], faults: FaultCounts
) -> Iterator[_Phrase]:
    """Yield the phrases; a pair that cannot be used is one fault, of its image where both are malformed."""
    for image, box in zip(images, boxes, strict=True):
        if isinstance(image, _Fault) or isinstance(box, _Fault):
            faults.add(*(image if isinstance(image, _Fault) else box))
            continue
        try:
            if box.image_id != image.entry_id:
                raise ValueError(f"images entry {image.entry_id} is beside an annotation of image_id {box.image_id}")
            corners = list(box_corners(box.xywh, image.width, image.height))
        except ValueError as error:
            faults.add(f"{file}, id {image.entry_id}", str(error))
        else:
            yield _Phrase(image.entry_id, image.file_name, corners, image.phrase)


REFCOCO, REFCOCO_PLUS, REFCOCOG = (
    DatasetReader(files(variant), partial(read, variant)) for variant in ("refcoco", "refcoco+", "refcocog")
)
