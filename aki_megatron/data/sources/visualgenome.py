"""Visual Genome: descriptions of regions, 5.4 million. https://homes.cs.washington.edu/~ranjay/visualgenome/api.html

The release has no split: every description is in ``train``, and there is no ``val``.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.boxes import PROMPT, box_text
from aki_megatron.data.sources.json_stream import Place, array
from aki_megatron.data.sources.records import PackedRows, Rows, naming, rows_of, text_of
from aki_megatron.types import Conversation, Turn

FILES = {
    "train": ("VisualGenome/region_descriptions.json", "VisualGenome/image_data.json", "VisualGenome/images"),
}


class _Row(NamedTuple):
    region_id: int | str
    image_id: int
    xywh: list[float]
    width: int
    height: int
    phrase: str


def read(root: Path, split: str) -> Sequence[Conversation]:
    """One sample per region: the box is given, the phrase is the answer. Boxes are cut off at the picture's edge.

    Boxes are looked at on access: one bad box of 5.4 million is a DataError of its sample, not of the file.
    """
    regions_file, pictures_file, folder = (root / name for name in FILES[split])
    sizes = dict(rows_of(pictures_file, array(pictures_file), _size))
    rows = rows_of(regions_file, array(regions_file), partial(_rows, sizes), id_field="id")
    return Rows(PackedRows(rows, _Row._make), partial(_conversation, folder))


def _conversation(folder: Path, row: _Row) -> Conversation:
    key = f"visualgenome/region/{row.region_id}"
    with naming(f"Sample {key}"):
        turn = Turn(PROMPT.format(box=box_text(row.xywh, row.width, row.height)), row.phrase)
    return Conversation(key, (turn,), folder / f"{row.image_id}.jpg")


def _picture(record: Any) -> int:
    return int(record["image_id"] if "image_id" in record else record["id"])  # "id" in releases before 1.2


def _size(place: Place, record: Any) -> Iterator[tuple[int, tuple[int, int]]]:
    yield _picture(record), (int(record["width"]), int(record["height"]))


def _rows(sizes: Mapping[int, tuple[int, int]], place: Place, record: Any) -> Iterator[_Row]:
    for number, region in enumerate(record["regions"]):
        image_id = int(region["image_id"]) if "image_id" in region else int(record["id"])
        if image_id not in sizes:
            raise ValueError(f"regions[{number}]: image_data.json does not give the size of picture {image_id}")
        width, height = sizes[image_id]
        xywh = [region["x"], region["y"], region["width"], region["height"]]
        region_id = region.get("region_id")
        if not isinstance(region_id, int):
            region_id = f"{image_id}.{number}"
        yield _Row(region_id, image_id, xywh, width, height, text_of(region, "phrase"))
