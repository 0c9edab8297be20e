"""Where entities are in a picture, as coverage of the encoder's patches: from rectangles or from masks.

H x W patches; the picture has its own width and height in pixels and is stretched to the encoder's square.
"""

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from aki_megatron.data.image import ImageOptions, UnreadableImage
from aki_megatron.errors import DataError

Size = tuple[int, int]
"""Width and height in pixels."""


def picture_size(image: bytes, options: ImageOptions, name: str) -> Size:
    """Return the size of a picture as the model sees it: turned where its photographs are turned."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return (ImageOps.exif_transpose(opened) if options.exif_rotation else opened).size
    except OSError as error:
        raise UnreadableImage(f"{name} is not a readable image: {error}") from error


def read_boxes(path: Path, size: Size, side: int) -> dict[str, Tensor]:
    """Read rectangles: ``{"cup": [left, top, right, bottom], "spoons": [[...], [...]]}`` in pixels of the picture.

    Returns entity -> coverage [side, side]: the fraction of each patch inside its rectangles. Raises DataError for a
    file of another form, and a rectangle that is empty or not inside the picture.
    """
    try:
        boxes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}.") from None
    form = 'give an object of entities, {"cup": [left, top, right, bottom], ...}, with one rectangle or a list of them'
    if not isinstance(boxes, Mapping) or not boxes:
        raise DataError(f"{path} has no entities; {form}.")
    found: dict[str, Tensor] = {}
    for name, value in boxes.items():
        rectangles = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        inside = np.zeros((size[1], size[0]))
        for rectangle in rectangles:
            if not _is_rectangle(rectangle):
                raise DataError(f"{path}: {name} is {rectangle!r}; {form}.")
            left, top, right, bottom = rectangle
            if not (0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]):
                raise DataError(
                    f"{path}: the rectangle {rectangle} of {name} must lie inside the picture, [0, 0, {size[0]}, "
                    f"{size[1]}], and have left < right and top < bottom (pixels of the original picture)."
                )
            inside = np.maximum(inside, np.outer(_overlap(top, bottom, size[1]), _overlap(left, right, size[0])))
        found[name] = coverage(inside, side)
    return found


def read_masks(folder: Path, size: Size, side: int) -> dict[str, Tensor]:
    """Read one PNG for each entity, named after it and as large as the picture; what is not black is the entity.

    Returns entity -> coverage [side, side]. Raises DataError for a folder without PNGs, a mask of another size, and an
    empty one.
    """
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise DataError(f"{folder} holds no masks; put one PNG for each entity there, named cup.png.")
    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            with Image.open(path) as opened:
                got, inside = opened.size, np.asarray(opened.convert("L")) > 0
        except OSError as error:
            raise DataError(f"{path} is not a readable image: {error}") from None
        if got != size:
            raise DataError(f"{path} has {got[0]} x {got[1]} pixels, the picture {size[0]} x {size[1]}; make them one.")
        if not inside.any():
            raise DataError(f"{path} is all black; what belongs to the entity must be white.")
        found[path.stem] = coverage(inside.astype(np.float64), side)
    return found


def coverage(inside: np.ndarray, side: int) -> Tensor:
    """Return [side, side]: the mean of ``inside`` [height, width] over each patch, fractions of pixels included."""
    height, width = inside.shape
    rows, columns = (
        np.stack([_overlap(n * pixels / side, (n + 1) * pixels / side, pixels) for n in range(side)])
        for pixels in (height, width)
    )
    return torch.from_numpy(rows @ inside @ columns.T * (side * side / (height * width))).float()


def latent_weights(covered: Tensor, latent_patches: Tensor) -> Tensor:
    """Return [Q], summing to 1: how much of what looks at an entity each latent is.

    covered         [H, W] coverage of patches
    latent_patches  [Q, H, W] where each latent looks (QuestionAttention)
    """
    weights = torch.einsum("yx,lyx->l", covered, latent_patches)
    return weights / weights.sum()


def _overlap(start: float, end: float, pixels: int) -> np.ndarray:
    """Return [pixels]: the part of each pixel that lies between two coordinates."""
    first = np.arange(pixels)
    return np.clip(np.minimum(first + 1, end) - np.maximum(first, start), 0.0, 1.0)


def _is_rectangle(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 4 and all(type(number) in (int, float) for number in value)
    return numbers and all(math.isfinite(number) for number in value)
