"""Encoded pictures to pixels as AKI prepares them.

Resize to a square ignoring the aspect ratio (bicubic, antialiased), RGB, mean 0.5 and standard deviation 0.5.
"""

import math
import random
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from aki_megatron.errors import DataError
from aki_megatron.types import Picture

MAX_PIXELS = 2**26
"""Largest width x height that is decoded (64 Mi, 192 MiB as RGB); a larger one is taken for a decompression bomb."""

FORMATS = ("JPEG", "PNG", "GIF")
"""GIF for OCR-VQA, some of whose covers are GIF files, whatever their names end in; their first frame counts."""

CROP_SHARE = (0.5, 1.0)
"""Least and largest share of the area that the official augmentation keeps."""

CROP_RATIO = (3 / 4, 4 / 3)
"""Narrowest and widest crop of the official augmentation: width / height."""

FLIP_SHARE = 0.5

_CROP_ATTEMPTS = 10

# what PIL raises on malformed files: OSError (truncated, unknown), SyntaxError (PNG), the others from its parsers
_MALFORMED = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, Image.DecompressionBombError)


class UnreadableImage(DataError):  # noqa: N818 (the name the rules of the house use)
    """A picture that is missing, malformed, truncated or too large; the message names the file or the key."""


def decode_image(image: Path | bytes, size: int, *, key: str) -> Picture:
    """Decode a JPEG, PNG or GIF and resize it to ``size`` x ``size`` RGB (bicubic, antialiased; aspect ratio ignored).

    ``key`` names the sample in the error. Raises UnreadableImage.
    """
    try:
        data = image.read_bytes() if isinstance(image, Path) else image
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise UnreadableImage(
                    f"{_name(image, key)} has {width} x {height} pixels, more than {MAX_PIXELS} (decompression bomb?)."
                )
            rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
            if rgb.size != (size, size):
                rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
            return Picture(rgb.tobytes(), size)
    except _MALFORMED as error:
        raise UnreadableImage(f"{_name(image, key)} is not a readable JPEG, PNG or GIF: {error}") from error


def augment(picture: Picture, key: int) -> Picture:
    """The released code's augmentation of AKI's fine-tuning: a random crop, enlarged again, then a random flip.

    torchvision's RandomResizedCrop (area 0.5 to 1, ratio 3/4 to 4/3, bicubic) and a horizontal flip with p = 0.5, on
    the square that the encoder sees. A pure function of the picture and the key. It does not keep the meaning: boxes
    stay behind, left and right change places, text is mirrored.
    """
    draws, size = random.Random(key), picture.size
    left, top, width, height = _crop(draws, size)
    flip = draws.random() < FLIP_SHARE
    rgb = Image.frombytes("RGB", (size, size), picture.rgb)
    if (width, height) != (size, size):
        rgb = rgb.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BICUBIC)
    if flip:
        rgb = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Picture(rgb.tobytes(), size)


def _crop(draws: random.Random, size: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) in a square of ``size``; all of it where no attempt fits, as torchvision does."""
    for _ in range(_CROP_ATTEMPTS):
        area = size * size * draws.uniform(*CROP_SHARE)
        ratio = math.exp(draws.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= size and 0 < height <= size:
            return draws.randint(0, size - width), draws.randint(0, size - height), width, height
    return 0, 0, size, size


class PictureCache:
    """Decodes, and keeps small pictures: datasets ask several questions about one picture.

    Pictures of more than ``largest_bytes`` are never kept (so few of them fit that none is met again in time), and
    nothing is dropped once ``budget_bytes`` are full. Safe to share between threads.
    """

    def __init__(self, size: int, *, budget_bytes: int = 2**27, largest_bytes: int = 2**16) -> None:
        self.size = size
        one = 3 * size * size
        self._room = budget_bytes // one if one <= largest_bytes else 0
        self._kept: dict[Path | str, Picture] = {}

    def decode(self, image: Path | bytes, *, key: str, augmentation: int | None = None) -> Picture:
        """As decode_image, then ``augment`` with the key given, if any. Raises UnreadableImage.

        Encoded bytes are told apart by their sample's key.
        """
        picture = self._plain(image, key)
        return picture if augmentation is None else augment(picture, augmentation)

    def _plain(self, image: Path | bytes, key: str) -> Picture:
        name = image if isinstance(image, Path) else key
        picture = self._kept.get(name)
        if picture is None:
            picture = decode_image(image, self.size, key=key)
            if len(self._kept) < self._room:
                self._kept[name] = picture
        return picture


def normalize(pictures: Sequence[Picture], size: int) -> Tensor:
    """float32 [N, 3, size, size] in [-1, 1]: bytes / 255, mean 0.5, standard deviation 0.5. N may be 0."""
    if not pictures:
        return torch.zeros(0, 3, size, size)
    assert all(picture.size == size for picture in pictures)
    # in a background process torch stacks straight into the memory it shares with the process that trains
    return default_collate([_normalized(picture) for picture in pictures])


def _normalized(picture: Picture) -> Tensor:
    """One picture, in place, which stays in the processor's cache; numpy starts no threads in the loader's."""
    rgb = np.frombuffer(picture.rgb, dtype=np.uint8).reshape(picture.size, picture.size, 3)
    pixels = np.ascontiguousarray(rgb.transpose(2, 0, 1)).astype(np.float32)
    pixels /= np.float32(255)
    pixels -= np.float32(0.5)
    pixels /= np.float32(0.5)
    return torch.from_numpy(pixels)


def load_image(image: Path | bytes, size: int, *, key: str = "") -> Tensor:
    """One picture as the encoder takes it: float32 [3, size, size]. Raises UnreadableImage."""
    return _normalized(decode_image(image, size, key=key))


def _name(image: Path | bytes, key: str) -> str:
    file = f"image {image}" if isinstance(image, Path) else "image"
    return f"{file} of sample {key}" if key else file
