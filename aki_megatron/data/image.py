"""Decode images and preprocess them as AKI does.

Resize to a square ignoring the aspect ratio (bicubic, antialiased), RGB, mean 0.5 and standard deviation 0.5.

The released code opens an image with Pillow and converts it to RGB, and so does this module, with one exception and two
options (ImageOptions). The exception: 16-bit grey keeps its high byte, as 16-bit color does; Pillow's conversion, which
the released code uses, cuts at 255 and so makes almost everything white.
"""

import math
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import default_collate

from aki_megatron.data.bad_samples import sample_errors
from aki_megatron.data.decode_cache import DecodeCache
from aki_megatron.data.file_kind import HEAD_BYTES, file_kind
from aki_megatron.errors import DataError
from aki_megatron.types import DecodedImage

MAX_PIXELS = 2**26
"""Largest width x height that is decoded (64 Mi, 192 MiB as RGB); a larger image is refused as a decompression bomb."""

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of the formats that are read, whatever the suffix of the file says; of several frames, the first.
Not among them is what runs other programs (EPS) or has no pixels (WMF)."""

CROP_AREA_RANGE = (0.5, 1.0)
"""Smallest and largest fraction of the area that the released code's augmentation keeps."""

CROP_ASPECT_RANGE = (3 / 4, 4 / 3)
"""Smallest and largest width / height of its crop."""

FLIP_PROBABILITY = 0.5

_CROP_ATTEMPTS = 10
_BITS_PER_SAMPLE = 258  # tag of TIFF

_ADDRESS = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>")


@dataclass(frozen=True)
class ImageOptions:
    """How an image becomes RGB; the defaults are what the released code does.

    transparency   ignore: the color that is stored under transparent pixels is taken, often black; white: the image is
                   laid on white
    exif_rotation  whether a photograph is turned as its EXIF orientation says; without it, as it is stored
    """

    transparency: str = "ignore"
    exif_rotation: bool = False

    def __post_init__(self) -> None:
        assert self.transparency in ("ignore", "white"), self.transparency


OFFICIAL_OPTIONS = ImageOptions()


class UnreadableImage(DataError):  # noqa: N818 (the field's name for it)
    """An image that is missing, malformed, truncated or too large; the message names the file or the key."""


def decode_image(
    image: Path | bytes,
    size: int,
    *,
    key: str,
    options: ImageOptions = OFFICIAL_OPTIONS,
    max_pixels: int = MAX_PIXELS,
) -> DecodedImage:
    """Decode an image of one of FORMATS and resize it to ``size`` x ``size`` RGB (bicubic; aspect ratio ignored).

    ``key`` names the sample in the error; an image of more than ``max_pixels`` is refused before it is decoded.
    Raises UnreadableImage, whatever goes wrong in the decoder.
    """
    name = _name(image, key)
    try:
        data = image.read_bytes() if isinstance(image, Path) else image
    except (OSError, ValueError, MemoryError) as error:  # ValueError: a path with a null byte or half a surrogate pair
        reason = error.strerror if isinstance(error, OSError) else None
        raise UnreadableImage(
            f"{name} cannot be read: {reason or str(error) or 'it does not fit into memory'}"
        ) from error
    try:
        with sample_errors(name):
            rgb = _decode_rgb(data, size, options, max_pixels)
    except UnreadableImage as error:
        raise UnreadableImage(f"{name} {error}") from error.__cause__
    except DataError as error:
        raise UnreadableImage(f"{name} is not a readable image: {_decoder_message(data, error)}") from error.__cause__
    checksum = zlib.crc32(data)
    if options != OFFICIAL_OPTIONS:
        checksum = zlib.crc32(repr(options).encode(), checksum)
    return DecodedImage(rgb, size, checksum)


def _decode_rgb(data: bytes, size: int, options: ImageOptions, max_pixels: int) -> bytes:
    """Return the RGB bytes of an image at ``size`` x ``size``. Raises UnreadableImage, and whatever decoders raise."""
    try:
        opened = Image.open(BytesIO(data), formats=_installed_formats())
    except UnidentifiedImageError as error:
        kind = file_kind(data[:HEAD_BYTES])
        form = kind.removeprefix("an ").removeprefix("a ").removesuffix(" image").replace(" ", "")
        hint = "; it is damaged at its beginning, or of a variant that is not read" if form in FORMATS else ""
        raise UnreadableImage(f"is not a readable image but {kind}{hint}. Read are {', '.join(FORMATS)}.") from error
    except Image.DecompressionBombError as error:  # Pillow's own limit is far above MAX_PIXELS
        raise UnreadableImage(f"has more than {max_pixels} pixels (decompression bomb?).") from error
    with opened:
        width, height = opened.size
        if width * height > max_pixels:
            raise UnreadableImage(f"has {width} x {height} pixels, more than {max_pixels} (decompression bomb?).")
        turned = ImageOps.exif_transpose(opened) if options.exif_rotation else opened
        grey_bits = _deep_grey_bits(opened)
        rgb = _high_byte_of_grey(turned, grey_bits, options) if grey_bits else _to_rgb(turned, options)
        if rgb.size != (size, size):
            rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
        return rgb.tobytes()


@cache
def _installed_formats() -> tuple[str, ...]:
    """Return FORMATS without those that this Pillow does not know (AVIF before 11.3): it raises KeyError for them."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _deep_grey_bits(opened: Image.Image) -> int:
    """Return the bits of a grey image of more than 8; 0 for other images. ``opened`` is as it was read, not turned."""
    if not (opened.mode.startswith("I;16") or (opened.mode == "I" and opened.format == "PPM")):
        return 0
    return min(16, *getattr(opened, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,)))


def _to_rgb(image: Image.Image, options: ImageOptions) -> Image.Image:
    """Convert to RGB as Pillow does. Raises UnreadableImage for 32-bit grey."""
    if image.mode == "RGB" and not (options.transparency == "white" and image.has_transparency_data):
        return image
    if image.mode in ("I", "F"):
        raise UnreadableImage(
            "has grey of 32 bits or of signed numbers, whose range is not known; convert it to 8 or 16 bits."
        )
    if options.transparency == "white" and image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _high_byte_of_grey(image: Image.Image, num_bits: int, options: ImageOptions) -> Image.Image:
    """Convert grey of 16 bits, or of 12 as some TIFFs have it, to RGB by the highest eight bits."""
    grey = np.asarray(image).astype(np.int64)
    high_byte = (grey >> (num_bits - 8)).astype(np.uint8)
    transparent = image.info.get("transparency")  # the value of transparent pixels (PNG)
    if options.transparency == "white" and isinstance(transparent, int):
        high_byte[grey == transparent] = 255
    return Image.fromarray(high_byte, "L").convert("RGB")


def _decoder_message(data: bytes, error: DataError) -> str:
    """Return what a decoder says, without addresses of objects, which make equal faults look different."""
    cause = error.__cause__
    text = _ADDRESS.sub("the file", str(cause)).strip()
    if not text or not isinstance(cause, OSError | SyntaxError | ValueError):
        text = f"{type(cause).__name__}{text and ': '}{text}"
    return f"{file_kind(data[:HEAD_BYTES])} that cannot be decoded ({text})."


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
    """Decode images and keep small ones (decode_cache.py). Safe to share between threads."""

    def __init__(
        self,
        size: int,
        options: ImageOptions = OFFICIAL_OPTIONS,
        *,
        max_bytes: int = 2**27,
        max_image_bytes: int = 2**16,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.size = size
        self._options = options
        self._max_pixels = max_pixels
        self._cache: DecodeCache[DecodedImage] = DecodeCache(
            3 * size * size, max_bytes=max_bytes, max_item_bytes=max_image_bytes
        )

    def decode(self, content: Path | bytes, *, key: str, augment_seed: int | None = None) -> DecodedImage:
        """Decode as decode_image does, then ``augment`` where a seed is given. Raises UnreadableImage."""
        decoded = self._cache.get(content, lambda: self._decode(content, key))
        return decoded if augment_seed is None else augment(decoded, augment_seed)

    def _decode(self, content: Path | bytes, key: str) -> DecodedImage:
        return decode_image(content, self.size, key=key, options=self._options, max_pixels=self._max_pixels)


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
