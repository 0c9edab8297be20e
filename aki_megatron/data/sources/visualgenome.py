"""Visual Genome: descriptions of regions, 5.4 million. https://homes.cs.washington.edu/~ranjay/visualgenome/api.html

The release has no split: every description is in ``train``, and there is no ``val``.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.boxes import PROMPT, box_text
from aki_megatron.data.sources.json_stream import JsonLocation, iter_array
from aki_megatron.data.sources.records import (
    DatasetReader,
    LazyConversations,
    PackedRecords,
    data_errors,
    parse_entries,
    text_field,
)
from aki_megatron.types import Conversation, Turn

FILES = {
    "train": ("VisualGenome/region_descriptions.json", "VisualGenome/image_data.json", "VisualGenome/images"),
}


class _Region(NamedTuple):
    region_id: int | str
    image_id: int
    xywh: list[float]
    image_width: int
    image_height: int
    phrase: str


def read(root: Path, split: str) -> Sequence[Conversation]:
    """Read one sample per region: the box is given, the phrase is the answer. Boxes are clipped to the image.

    Boxes are checked on access: one bad box of 5.4 million is a DataError of its sample, not of the file.
    """
    regions_file, images_file, folder = (root / name for name in FILES[split])
    image_sizes = dict(parse_entries(images_file, iter_array(images_file), _parse_image_size))
    regions = parse_entries(regions_file, iter_array(regions_file), partial(_parse, image_sizes), id_field="id")
    return LazyConversations(PackedRecords(regions, _Region._make), partial(_conversation, folder))


def _conversation(folder: Path, region: _Region) -> Conversation:
    key = f"visualgenome/region/{region.region_id}"
    with data_errors(f"Sample {key}"):
        box = box_text(region.xywh, region.image_width, region.image_height)
        turn = Turn(PROMPT.format(box=box), region.phrase)
    return Conversation(key, (turn,), folder / f"{region.image_id}.jpg")


def _parse_image_size(location: JsonLocation, entry: Any) -> Iterator[tuple[int, tuple[int, int]]]:
    image_id = int(entry["image_id"] if "image_id" in entry else entry["id"])  # "id" in releases before 1.2
    yield image_id, (int(entry["width"]), int(entry["height"]))


def _parse(image_sizes: Mapping[int, tuple[int, int]], location: JsonLocation, entry: Any) -> Iterator[_Region]:
    for number, region in enumerate(entry["regions"]):
        image_id = int(region["image_id"]) if "image_id" in region else int(entry["id"])
        if image_id not in image_sizes:
            raise ValueError(f"regions[{number}]: image_data.json does not give the size of image {image_id}")
        width, height = image_sizes[image_id]
        xywh = [region["x"], region["y"], region["width"], region["height"]]
        region_id = region.get("region_id")
        if not isinstance(region_id, int):
            region_id = f"{image_id}.{number}"
        yield _Region(region_id, image_id, xywh, width, height, text_field(region, "phrase"))


READER = DatasetReader(FILES, read)
