"""Encode images, write JSON and webdataset tars. Every byte follows from the arguments: no clock, no user name."""

import io
import json
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

from PIL import Image

from aki_megatron.data.shard_writer import SampleWriter
from aki_megatron.synthetic.scenes import Pixels

IMAGE_HOST = "http://drawn.invalid"
"""Host of the image addresses that some formats require; nothing is served there. Part of the files: never change."""

COCO_INFO = {"description": "Scenes drawn by aki-megatron's tools/make_data.py", "version": "1.0"}
COCO_LICENSE = {"name": "Apache License 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}
"""What COCO-like annotation files begin with. Part of the files: never change."""


def encode_image(pixels: Pixels, extension: str) -> bytes:
    """Return a PNG or JPEG file; ``extension`` is png or jpg.

    JPEGs have quality 95 and no chroma subsampling (4:4:4): the objects are a few pixels wide.
    """
    if extension == "png":
        return _encode(pixels, format="PNG", compress_level=1)
    return _encode(pixels, format="JPEG", quality=95, subsampling=0)


def _encode(pixels: Pixels, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **options)
    return buffer.getvalue()


def write_tar(path: Path, samples: Iterable[tuple[str, str, bytes, str]]) -> None:
    """Write a webdataset shard of (key, image extension, image bytes, text): two members per key, image first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(SampleWriter(path)) as tar:
        for key, extension, image, text in samples:
            tar.write(key, extension, image, text)


def write_json(path: Path, content: object) -> None:
    """Write compact JSON, keys in the order given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")))
