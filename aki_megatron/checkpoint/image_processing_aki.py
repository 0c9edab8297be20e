"""AKI's image processor for plain transformers (>= 5.0, < 6): this file is copied into an exported folder.

    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    pixel_values = image_processor(images, return_tensors="pt")["pixel_values"]

Pixels are those of training: RGB, resized to a square whatever the aspect ratio (bicubic), in [-1, 1]. 16-bit grey
keeps its high byte. preprocessor_config.json says whether transparent images are laid on white and whether photographs
are turned as their EXIF orientation says, which is what the model was trained with.
"""

import base64
import binascii
import urllib.request
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import BaseImageProcessor, BatchFeature

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Pillow's names of the formats that are read. Not among them is what runs other programs (EPS)."""

CHANNEL_COUNTS = (1, 2, 3, 4)
"""Grey, grey with alpha, RGB, RGB with alpha."""

URL_TIMEOUT_SECONDS = 60

_BITS_PER_SAMPLE = 258
"""Number of TIFF's tag."""

_ALWAYS_DONE = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
"""Arguments of other image processors that may be True here, and not False."""


class AkiImageProcessor(BaseImageProcessor):
    """Images to pixel_values, float32 [N, 3, height, width].

    size           height and width in pixels, which are equal
    transparency   ignore: the color that is stored under transparent pixels is taken, often black; white: the image is
                   laid on white
    exif_rotation  whether a photograph is turned as its EXIF orientation says; without it, as it is stored
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: Mapping[str, int] | int = 384,
        transparency: str = "ignore",
        exif_rotation: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        height, width = (size, size) if isinstance(size, int) else (size["height"], size["width"])
        if height != width:
            raise ValueError(f"size={size} must be a square: the encoder has one image size.")
        if transparency not in ("ignore", "white"):
            raise ValueError(f"transparency={transparency!r} is unknown; choose 'ignore' or 'white'.")
        self.size = {"height": int(height), "width": int(width)}
        self.transparency = transparency
        self.exif_rotation = exif_rotation

    def preprocess(self, images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        """Return the pixels of one image, of a list, or of lists of lists, in order.

        images  PIL images; paths, URLs, base64 strings or bytes of an encoded image; numpy arrays and torch tensors of
                one image [H, W], [H, W, C] or [C, H, W], or of several with one more dimension in front

        Arrays hold bytes, 16-bit numbers, or fractions in [0, 1], as torchvision writes them. A shape that may be both
        is [H, W, C] in numpy and [C, H, W] in torch.

        Raises ValueError for what cannot be read, and for arguments that it does not have.
        """
        refused = sorted(
            key for key, value in kwargs.items() if value is not None and not (key in _ALWAYS_DONE and value is True)
        )
        if refused:
            raise ValueError(f"AkiImageProcessor has no {', '.join(refused)}: pixels are those of training.")
        pixels = [self._pixels(self._open(image)) for image in flatten_images(images)]
        size = self.size["height"]
        stacked = np.stack(pixels) if pixels else np.zeros((0, 3, size, size), dtype=np.float32)
        return BatchFeature({"pixel_values": stacked}, tensor_type=return_tensors)

    def _open(self, image: Any) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        if isinstance(image, np.ndarray | torch.Tensor):
            return _from_array(image)
        Image.init()
        return Image.open(_source(image), formats=[name for name in FORMATS if name in Image.OPEN])

    def _pixels(self, image: Image.Image) -> np.ndarray:
        """float32 [3, size, size] in [-1, 1]: bytes / 255, mean 0.5, standard deviation 0.5."""
        turned = ImageOps.exif_transpose(image) if self.exif_rotation else image
        grey_bits, size = _deep_grey_bits(image), (self.size["width"], self.size["height"])
        rgb = self._high_byte_of_grey(turned, grey_bits) if grey_bits else self._rgb(turned)
        if rgb.size != size:
            rgb = rgb.resize(size, Image.Resampling.BICUBIC)
        pixels = np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1)).astype(np.float32)
        return (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)

    def _high_byte_of_grey(self, image: Image.Image, num_bits: int) -> Image.Image:
        """Grey of 16 bits, or of 12 as some TIFFs have it, by the highest eight bits."""
        grey = np.asarray(image).astype(np.int64)
        high_byte = (grey >> (num_bits - 8)).astype(np.uint8)
        transparent = image.info.get("transparency")  # the value of transparent pixels (PNG)
        if self.transparency == "white" and isinstance(transparent, int):
            high_byte[grey == transparent] = 255
        return Image.fromarray(high_byte, "L").convert("RGB")

    def _rgb(self, image: Image.Image) -> Image.Image:
        if image.mode in ("I", "F"):
            raise ValueError("An image of 32-bit grey, whose range is not known; convert it to 8 or 16 bits.")
        if self.transparency == "white" and image.has_transparency_data:
            rgba = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
        return image.convert("RGB")


def _deep_grey_bits(image: Image.Image) -> int:
    """Bits of a grey image of more than 8; 0 for other images."""
    if not (image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")):
        return 0
    return min(16, *getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,)))


def flatten_images(images: Any) -> list[Any]:
    """Return the single images in nested lists, in order; arrays of several images are split."""
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [image for group in images for image in flatten_images(group)]
    if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        return list(images)
    return [images]


def _from_array(array: np.ndarray | torch.Tensor) -> Image.Image:
    """The image of an array [H, W], [H, W, C] or [C, H, W]."""
    if is_tensor := isinstance(array, torch.Tensor):
        tensor = array.detach().cpu()
        values = (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # numpy has no bfloat16
    else:
        values = array
    first, last = values.ndim == 3 and values.shape[0] in CHANNEL_COUNTS, values.shape[-1] in CHANNEL_COUNTS
    if values.ndim not in (2, 3) or (values.ndim == 3 and not first and not last) or 0 in values.shape:
        raise ValueError(f"An image of shape {values.shape}; give [H, W], [H, W, C] or [C, H, W] with C of 1 to 4.")
    if first and (is_tensor or not last):
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    values = _as_bytes(values)
    return Image.fromarray(values, "L" if values.ndim == 2 else {2: "LA", 3: "RGB", 4: "RGBA"}[values.shape[-1]])


def _as_bytes(values: np.ndarray) -> np.ndarray:
    """Return an image's values as bytes."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    if values.dtype == np.uint16:
        return (values >> 8).astype(np.uint8)
    fractions = np.issubdtype(values.dtype, np.floating)
    allowed = 1 if fractions else 255
    if not (fractions or np.issubdtype(values.dtype, np.integer)) or not ((values >= 0) & (values <= allowed)).all():
        raise ValueError(
            f"An image of {values.dtype} values in [{values.min()}, {values.max()}], whose range is not known; give "
            "bytes (uint8), 16-bit numbers (uint16) or fractions in [0, 1]."
        )
    return np.round(values * 255).astype(np.uint8) if fractions else values.astype(np.uint8)


def _source(image: Any) -> BytesIO | Path:
    """What Pillow opens: a path as it is, else the bytes of a URL, of base64, or as given."""
    if isinstance(image, bytes):
        return BytesIO(image)
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        with urllib.request.urlopen(image, timeout=URL_TIMEOUT_SECONDS) as response:
            return BytesIO(response.read())
    if isinstance(image, str) and image.startswith("data:"):
        return BytesIO(base64.b64decode(image.partition(",")[2]))
    if not isinstance(image, str | Path):
        raise ValueError(f"{type(image).__name__} is no image; give a PIL image, an array, a path, a URL or bytes.")
    try:
        if Path(image).is_file():
            return Path(image)
    except (OSError, ValueError):  # too long for a name: base64
        pass
    try:
        return BytesIO(base64.b64decode(str(image), validate=True))
    except (binascii.Error, ValueError):
        raise ValueError(f"{str(image)[:200]} is no file, no URL and no base64 of an image.") from None
