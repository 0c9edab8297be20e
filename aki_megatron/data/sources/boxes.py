"""Boxes as the papers write them: corners as shares of the picture's width and height, three decimals."""

import math
from collections.abc import Sequence

PROMPT = "Provide a short description for this region. {box}"

Corners = tuple[float, float, float, float]
"""x1, y1, x2, y2 in [0, 1]."""


def corners(xywh: Sequence[float], width: float, height: float) -> Corners:
    """COCO's (x, y, width, height) in pixels as corners in [0, 1], three decimals; what sticks out is cut off.

    Raises ValueError for a picture without pixels and for coordinates that are no numbers.
    """
    x, y, box_width, box_height = xywh
    if not (width > 0 and height > 0 and all(map(math.isfinite, (x, y, box_width, box_height)))):
        raise ValueError(f"the box {list(xywh)} in a picture of {width} x {height} pixels has no place")
    x1, y1, x2, y2 = (
        round(min(max(share, 0.0), 1.0), 3)
        for share in (x / width, y / height, (x + box_width) / width, (y + box_height) / height)
    )
    return x1, y1, x2, y2


def corners_text(box: Sequence[float]) -> str:
    """``<bbox>[0.100, 0.250][0.350, 1.000]</bbox>``"""
    x1, y1, x2, y2 = box
    return f"<bbox>[{x1:.3f}, {y1:.3f}][{x2:.3f}, {y2:.3f}]</bbox>"


def box_text(xywh: Sequence[float], width: float, height: float) -> str:
    """COCO's (x, y, width, height) in pixels as text: ``<bbox>[x1, y1][x2, y2]</bbox>``."""
    return corners_text(corners(xywh, width, height))
