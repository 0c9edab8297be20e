"""Boxes as the papers write them: corners as fractions of the image's width and height, three decimals."""

import math
from collections.abc import Sequence

PROMPT = "Provide a short description for this region. {box}"

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2 in [0, 1]."""


def box_corners(xywh: Sequence[float], width: float, height: float) -> Corners:
    """Return COCO's (x, y, width, height) in pixels as corners in [0, 1], three decimals, clipped to the image.

    Raises ValueError for an image without pixels, for coordinates that are no numbers, and for a box that names no
    region: of negative size, outside of the image, or so thin that three decimals leave nothing of it.
    """
    x, y, box_width, box_height = xywh
    if not (width > 0 and height > 0 and all(map(math.isfinite, (x, y, box_width, box_height)))):
        raise ValueError(f"the box {list(xywh)} cannot be normalized by an image of {width} x {height} pixels")
    if box_width < 0 or box_height < 0:
        raise ValueError(f"the box {list(xywh)} (x, y, width, height) has a negative size")
    if x >= width or y >= height or x + box_width <= 0 > x or y + box_height <= 0 > y:
        raise ValueError(f"the box {list(xywh)} (x, y, width, height) is outside of the {width} x {height} image")
    x1, y1, x2, y2 = (
        round(min(max(fraction, 0.0), 1.0), 3)
        for fraction in (x / width, y / height, (x + box_width) / width, (y + box_height) / height)
    )
    if x1 == x2 or y1 == y2:
        raise ValueError(f"the box {list(xywh)} (x, y, width, height) is empty in the {width} x {height} image")
    return x1, y1, x2, y2


def check_box(xywh: Sequence[float], width: float, height: float) -> None:
    """Raise ValueError as ``box_corners`` does; quick for a box inside the image that is more than two decimals thick.

    Visual Genome has 5.4 million.
    """
    x, y, box_width, box_height = xywh
    inside = x >= 0 and y >= 0 and x + box_width <= width and y + box_height <= height
    if not (inside and box_width > 0.01 * width > 0 and box_height > 0.01 * height > 0):
        box_corners(xywh, width, height)


def corners_text(corners: Sequence[float]) -> str:
    """Return ``<bbox>[0.100, 0.250][0.350, 1.000]</bbox>`` for x1, y1, x2, y2."""
    x1, y1, x2, y2 = corners
    return f"<bbox>[{x1:.3f}, {y1:.3f}][{x2:.3f}, {y2:.3f}]</bbox>"


def box_text(xywh: Sequence[float], width: float, height: float) -> str:
    """Return COCO's (x, y, width, height) in pixels as the text of its corners. Raises ValueError as box_corners."""
    return corners_text(box_corners(xywh, width, height))
