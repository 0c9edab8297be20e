"""Types of command-line arguments: each turns a text into a value, or says what is wrong with it."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path


def as_path(text: str) -> Path:
    """Return a path in which the shell may have left ~ as it is (--out=~/x)."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a path is empty")
    return Path(text).expanduser()


def whole_number(least: int, most: int) -> Callable[[str], int]:
    """Return the type of whole numbers from ``least`` to ``most``."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is no whole number from {least} to {most}")
        return int(text)

    return number


def gigabytes(text: str) -> float:
    """Return a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return number
