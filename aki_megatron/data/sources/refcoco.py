"""RefCOCO, RefCOCO+ and RefCOCOg in MDETR's format: describe the region of a box. https://github.com/ashkamath/mdetr"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.boxes import PROMPT as PROMPT
from aki_megatron.data.sources.boxes import box_text as box_text
from aki_megatron.data.sources.boxes import corners, corners_text
from aki_megatron.data.sources.json_stream import Place, arrays
from aki_megatron.data.sources.records import PackedRows, Rows, inside, naming, rows_of, text_of
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation, Turn

VARIANTS = ("refcoco", "refcoco+", "refcocog")


class _Entry(NamedTuple):
    """What one element of ``images`` says: MDETR repeats the picture for every phrase."""

    entry_id: int
    file_name: str
    width: float
    height: float
    phrase: str


class _Row(NamedTuple):
    entry_id: int
    file_name: str
    box: list[float]
    phrase: str


def files(variant: str) -> dict[str, tuple[str, ...]]:
    """Split -> annotation file and image folder."""
    return {
        split: (f"ref/annotations/finetune_{variant}_{split}.json", "VQA/train2014")
        for split in ("train", "val")  # every split shows pictures of COCO's train2014
    }


FILES = files("refcoco")


def read(root: Path, split: str, variant: str = "refcoco") -> Sequence[Conversation]:
    """One sample per referring phrase: the box is given, the phrase is the answer."""
    file, folder = (root / name for name in files(variant)[split])
    entries: list[_Entry] = []
    annotations: list[tuple[int, list[float]]] = []
    for kind in rows_of(file, arrays(file, "images", "annotations"), _parse, id_field="id"):
        if isinstance(kind, _Entry):
            entries.append(kind)
        else:
            annotations.append(kind)
    if len(entries) != len(annotations):
        raise DataError(
            f"{file}: {len(entries)} images but {len(annotations)} annotations; they are paired by order (MDETR)."
        )
    rows = PackedRows(_paired(file, entries, annotations), _Row._make)
    return Rows(rows, partial(_conversation, folder, variant))


def _conversation(folder: Path, variant: str, row: _Row) -> Conversation:
    key = f"{variant}/region/{row.entry_id}"
    turn = Turn(PROMPT.format(box=corners_text(row.box)), row.phrase)
    return Conversation(key, (turn,), inside(folder, row.file_name, key=key))


def _parse(place: Place, record: Any) -> Iterator[_Entry | tuple[int, list[float]]]:
    if place.name == "images":
        width, height = float(record["width"]), float(record["height"])
        yield _Entry(int(record["id"]), text_of(record, "file_name"), width, height, text_of(record, "caption"))
    elif place.name == "annotations":
        x, y, width, height = (float(number) for number in record["bbox"])
        yield int(record["image_id"]), [x, y, width, height]


def _paired(file: Path, entries: list[_Entry], annotations: list[tuple[int, list[float]]]) -> Iterator[_Row]:
    entry: _Entry | None = None
    with naming(lambda: f"{file}, id {entry.entry_id if entry else None}"):
        for entry, (image_id, xywh) in zip(entries, annotations, strict=True):
            if image_id != entry.entry_id:
                raise ValueError(f"images entry {entry.entry_id} stands beside an annotation of image_id {image_id}")
            box = list(corners(xywh, entry.width, entry.height))
            yield _Row(entry.entry_id, entry.file_name, box, entry.phrase)
