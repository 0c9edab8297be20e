"""Boxes as the papers write them: corners as fractions of the image's width and height, three decimals."""

import math
from collections.abc import Sequence

PROMPT = "Provide a short description for this region. {box}"

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2 in [0, 1]."""


def box_corners(xywh: Sequence[float], width: float, height: float) -> Corners:
    """Return COCO's (x, y, width, height) in pixels as corners in [0, 1], three decimals, clipped to the image.

    Raises ValueError for an image without pixels and for coordinates that are no numbers.
    """
    x, y, box_width, box_height = xywh
    if not (width > 0 and height > 0 and all(map(math.isfinite, (x, y, box_width, box_height)))):
        raise ValueError(f"the box {list(xywh)} cannot be normalized by an image of {width} x {height} pixels")
    x1, y1, x2, y2 = (
        round(min(max(fraction, 0.0), 1.0), 3)
        for fraction in (x / width, y / height, (x + box_width) / width, (y + box_height) / height)
    )
    return x1, y1, x2, y2


def corners_text(corners: Sequence[float]) -> str:
    """Return ``<bbox>[0.100, 0.250][0.350, 1.000]</bbox>`` for x1, y1, x2, y2."""
    x1, y1, x2, y2 = corners
    return f"<bbox>[{x1:.3f}, {y1:.3f}][{x2:.3f}, {y2:.3f}]</bbox>"


def box_text(xywh: Sequence[float], width: float, height: float) -> str:
    """Return COCO's (x, y, width, height) in pixels as the text of its corners."""
    return corners_text(box_corners(xywh, width, height))
