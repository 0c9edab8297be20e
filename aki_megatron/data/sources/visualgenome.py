"""Visual Genome: descriptions of regions, 5.4 million. https://homes.cs.washington.edu/~ranjay/visualgenome/api.html

The release has no split: every description is in ``train``, and there is no ``val``.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.boxes import PROMPT, box_text, check_box
from aki_megatron.data.sources.json_stream import JsonLocation, iter_array
from aki_megatron.data.sources.records import (
    MALFORMED,
    DatasetReader,
    LazyConversations,
    PackedRecords,
    as_int,
    as_list,
    describe_entry,
    error_reason,
    parse_entries,
    text_field,
)
from aki_megatron.types import Conversation, Turn, image_items

ANNOTATIONS = ("VisualGenome/region_descriptions.json", "VisualGenome/image_data.json")
FILES = {"train": (*ANNOTATIONS, "VisualGenome/images")}

RELEASED_FOLDERS = ("VG_100K", "VG_100K_2")
"""The two folders of images.zip and images2.zip."""


class _Region(NamedTuple):
    region_id: int | str
    image_id: int
    xywh: list[float]
    image_width: int
    image_height: int
    phrase: str


def find_files(root: Path, split: str) -> tuple[str, ...]:
    """Return the files of a root: the images in one folder, or in the two of the release, in it or beside it."""
    one = FILES[split][-1]
    within, beside = ([f"{parent}/{name}" for name in RELEASED_FOLDERS] for parent in (one, "VisualGenome"))
    if any((root / folder).is_dir() for folder in within):
        return (*ANNOTATIONS, *within)
    if not (root / one).exists() and any((root / folder).is_dir() for folder in beside):
        return (*ANNOTATIONS, *beside)
    return FILES[split]


def read(root: Path, split: str) -> LazyConversations[_Region]:
    """Read one sample per region: the box is given, the phrase is the answer. Boxes are clipped to the image."""
    regions_file, images_file = (root / name for name in ANNOTATIONS)
    folders = [root / name for name in find_files(root, split)[len(ANNOTATIONS) :]]
    faults = FaultCounts()
    sizes: dict[int, tuple[int, int] | None] = {}
    for image_id, size in parse_entries(images_file, iter_array(images_file), _parse_image_size, faults):
        if sizes.setdefault(image_id, size) != size:
            sizes[image_id] = None  # which of the two it has is not known
    parse = partial(_parse, regions_file, faults, sizes)
    regions = parse_entries(regions_file, iter_array(regions_file), parse, faults, id_field="id")
    return LazyConversations(PackedRecords(regions, _Region._make), partial(_conversation, folders), faults)


def _conversation(folders: list[Path], region: _Region) -> Conversation:
    key = f"visualgenome/region/{region.region_id}"
    box = box_text(region.xywh, region.image_width, region.image_height)
    name = f"{region.image_id}.jpg"
    present = (folder / name for folder in folders[:-1] if (folder / name).exists())
    return Conversation(
        key, (Turn(PROMPT.format(box=box), region.phrase),), image_items(next(present, folders[-1] / name))
    )


def _parse_image_size(location: JsonLocation, entry: Any) -> Iterator[tuple[int, tuple[int, int]]]:
    # "id" in releases before 1.2
    image_id = as_int(entry["image_id"] if "image_id" in entry else entry["id"], "image_id")
    yield image_id, (as_int(entry["width"], "width"), as_int(entry["height"], "height"))


def _parse(
    file: Path,
    faults: FaultCounts,
    image_sizes: Mapping[int, tuple[int, int] | None],
    location: JsonLocation,
    entry: Any,
) -> Iterator[_Region]:
    """Yield the regions of an image; one that is malformed is left out without the others."""
    for number, region in enumerate(as_list(entry["regions"], "regions")):
        try:
            yield _parse_region(image_sizes, entry, number, region)
        except MALFORMED as error:
            faults.add(f"{describe_entry(file, location, entry, 'id')}, regions[{number}]", error_reason(error))


def _parse_region(image_sizes: Mapping[int, tuple[int, int] | None], entry: Any, number: int, region: Any) -> _Region:
    image_id = as_int(region["image_id"] if "image_id" in region else entry["id"], "image_id")
    if image_id not in image_sizes:
        raise ValueError(f"image_data.json does not give the size of image {image_id}")
    if (size := image_sizes[image_id]) is None:
        raise ValueError(f"image_data.json gives two sizes of image {image_id}")
    xywh = [region["x"], region["y"], region["width"], region["height"]]
    check_box(xywh, *size)
    region_id = region.get("region_id")
    if not isinstance(region_id, int):
        region_id = f"{image_id}.{number}"
    return _Region(region_id, image_id, xywh, *size, text_field(region, "phrase"))


READER = DatasetReader(FILES, read, find_files=find_files)
