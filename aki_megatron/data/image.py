"""Decode images and preprocess them as AKI does.

Resize to a square ignoring the aspect ratio (bicubic, antialiased), RGB, mean 0.5 and standard deviation 0.5.
"""

import math
import random
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from aki_megatron.errors import DataError
from aki_megatron.types import DecodedImage

MAX_PIXELS = 2**26
"""Largest width x height that is decoded (64 Mi, 192 MiB as RGB); a larger image is refused as a decompression bomb."""

FORMATS = ("JPEG", "PNG", "GIF")
"""GIF for OCR-VQA, some of whose covers are GIF files whatever their suffix; the first frame is used."""

CROP_AREA_RANGE = (0.5, 1.0)
"""Smallest and largest fraction of the area that the released code's augmentation keeps."""

CROP_ASPECT_RANGE = (3 / 4, 4 / 3)
"""Smallest and largest width / height of its crop."""

FLIP_PROBABILITY = 0.5

_CROP_ATTEMPTS = 10

# what PIL raises on malformed files: OSError (truncated, unknown), SyntaxError (PNG), the others from its parsers
_MALFORMED = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, Image.DecompressionBombError)


class UnreadableImage(DataError):  # noqa: N818 (the field's name for it)
    """An image that is missing, malformed, truncated or too large; the message names the file or the key."""


def decode_image(image: Path | bytes, size: int, *, key: str) -> DecodedImage:
    """Decode a JPEG, PNG or GIF and resize it to ``size`` x ``size`` RGB (bicubic, antialiased; aspect ratio ignored).

    ``key`` names the sample in the error. Raises UnreadableImage.
    """
    try:
        data = image.read_bytes() if isinstance(image, Path) else image
        with Image.open(BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(
                    f"{_name(image, key)} has {width} x {height} pixels, more than {MAX_PIXELS} (decompression bomb?)."
                )
            rgb = opened if opened.mode == "RGB" else opened.convert("RGB")
            if rgb.size != (size, size):
                rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
            return DecodedImage(rgb.tobytes(), size, zlib.crc32(data))
    except _MALFORMED as error:
        raise UnreadableImage(f"{_name(image, key)} is not a readable JPEG, PNG or GIF: {error}") from error


def augment(image: DecodedImage, seed: int) -> DecodedImage:
    """Apply the released code's augmentation of AKI's fine-tuning: a random resized crop, then a random flip.

    torchvision's RandomResizedCrop (area 0.5 to 1, ratio 3/4 to 4/3, bicubic) and a horizontal flip with p = 0.5, on
    the square that the encoder sees. A pure function of the image and the seed. It does not keep the meaning: boxes
    do not move with it, left and right change places, text is mirrored.
    """
    rng, size = random.Random(seed), image.size
    left, top, width, height = _crop(rng, size)
    flip = rng.random() < FLIP_PROBABILITY
    rgb = Image.frombytes("RGB", (size, size), image.rgb)
    if (width, height) != (size, size):
        rgb = rgb.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    if flip:
        rgb = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return DecodedImage(rgb.tobytes(), size, zlib.crc32(f"augment {seed}".encode(), image.checksum))


def _crop(rng: random.Random, size: int) -> tuple[int, int, int, int]:
    """Return (left, top, width, height) in a square of ``size``; all of it where no attempt fits, as in torchvision."""
    for _ in range(_CROP_ATTEMPTS):
        area = size * size * rng.uniform(*CROP_AREA_RANGE)
        ratio = math.exp(rng.uniform(math.log(CROP_ASPECT_RANGE[0]), math.log(CROP_ASPECT_RANGE[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= size and 0 < height <= size:
            return rng.randint(0, size - width), rng.randint(0, size - height), width, height
    return 0, 0, size, size


class ImageCache:
    """Decode images and keep small ones: datasets ask several questions about one image.

    Decoded images of more than ``max_image_bytes`` are never kept (so few of them fit that none is met again in time),
    and nothing is evicted once ``max_bytes`` are full. Safe to share between threads.
    """

    def __init__(self, size: int, *, max_bytes: int = 2**27, max_image_bytes: int = 2**16) -> None:
        self.size = size
        image_bytes = 3 * size * size
        self._max_images = max_bytes // image_bytes if image_bytes <= max_image_bytes else 0
        self._cached: dict[Path | str, DecodedImage] = {}

    def decode(self, image: Path | bytes, *, key: str, augment_seed: int | None = None) -> DecodedImage:
        """Decode as decode_image does, then ``augment`` where a seed is given. Raises UnreadableImage.

        Encoded bytes are cached under their sample's key.
        """
        decoded = self._decode_cached(image, key)
        return decoded if augment_seed is None else augment(decoded, augment_seed)

    def _decode_cached(self, image: Path | bytes, key: str) -> DecodedImage:
        name = image if isinstance(image, Path) else key
        decoded = self._cached.get(name)
        if decoded is None:
            decoded = decode_image(image, self.size, key=key)
            if len(self._cached) < self._max_images:
                self._cached[name] = decoded
        return decoded


def normalize(images: Sequence[DecodedImage], size: int) -> Tensor:
    """Return float32 [N, 3, size, size] in [-1, 1]: bytes / 255, mean 0.5, standard deviation 0.5. N may be 0."""
    if not images:
        return torch.zeros(0, 3, size, size)
    assert all(image.size == size for image in images)
    # in a worker process torch stacks straight into the memory it shares with the process that trains
    return default_collate([_normalized(image) for image in images])


def _normalized(image: DecodedImage) -> Tensor:
    """Normalize one image in place, inside the processor's cache; numpy starts no threads in the worker processes."""
    rgb = np.frombuffer(image.rgb, dtype=np.uint8).reshape(image.size, image.size, 3)
    pixels = np.ascontiguousarray(rgb.transpose(2, 0, 1)).astype(np.float32)
    pixels /= np.float32(255)
    pixels -= np.float32(0.5)
    pixels /= np.float32(0.5)
    return torch.from_numpy(pixels)


def _name(image: Path | bytes, key: str) -> str:
    file = f"image {image}" if isinstance(image, Path) else "image"
    return f"{file} of sample {key}" if key else file
