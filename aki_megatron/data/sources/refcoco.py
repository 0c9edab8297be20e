"""RefCOCO in MDETR's format: describe the region of a box. https://github.com/ashkamath/mdetr"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.reading import Rows, inside, naming, read_json
from aki_megatron.flow import Conversation, DataError, Turn

PROMPT = "Provide a short description for this region. {box}"

FILES = {
    split: (f"ref/annotations/finetune_refcoco_{split}.json", "VQA/train2014")
    for split in ("train", "val")  # every split of RefCOCO shows pictures of COCO's train2014
}


class _Row(NamedTuple):
    entry_id: int
    file_name: str
    box: str
    phrase: str


def read(root: Path, split: str) -> Sequence[Conversation]:
    """One sample per referring phrase: the box is given, the phrase is the answer."""
    name, images = FILES[split]
    file = root / name
    with naming(str(file)):
        content = read_json(file)
        entries, annotations = content["images"], content["annotations"]
    if len(entries) != len(annotations):
        raise DataError(
            f"{file}: {len(entries)} images but {len(annotations)} annotations; they are paired by order (MDETR)."
        )
    with naming(str(file)):
        rows = [_row(entry, annotation) for entry, annotation in zip(entries, annotations, strict=True)]

    def build(row: _Row) -> Conversation:
        key = f"refcoco/region/{row.entry_id}"
        image = inside(root / images, row.file_name, key=key)
        return Conversation(key, (Turn(PROMPT.format(box=row.box), row.phrase),), image)

    return Rows(rows, build)


def box_text(xywh: Sequence[float], width: float, height: float) -> str:
    """COCO's (x, y, width, height) in pixels as corners in [0, 1]: ``<bbox>[x1, y1][x2, y2]</bbox>``, 3 decimals."""
    x, y, box_width, box_height = xywh
    corners = (x / width, y / height, (x + box_width) / width, (y + box_height) / height)
    x1, y1, x2, y2 = (f"{min(max(corner, 0.0), 1.0):.3f}" for corner in corners)
    return f"<bbox>[{x1}, {y1}][{x2}, {y2}]</bbox>"


def _row(entry: dict[str, Any], annotation: dict[str, Any]) -> _Row:
    if annotation["image_id"] != entry["id"]:
        raise ValueError(f"images entry {entry['id']} stands beside an annotation of image_id {annotation['image_id']}")
    box = box_text(annotation["bbox"], entry["width"], entry["height"])
    return _Row(int(entry["id"]), str(entry["file_name"]), box, str(entry["caption"]))
