"""Files of one JSON object a line that survive an interruption in the middle of a line."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError


def append_lines(path: Path, objects: Iterable[dict[str, Any]]) -> None:
    """Append objects; a line cut short by an interruption before is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        for item in objects:
            file.write(json.dumps(item).encode() + b"\n")


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object), without lines that an interruption cut short.

    Such a line begins an object and does not end it. Raises DataError for any other line that is no JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            stripped = line.strip()
            if not stripped:
                continue
            try:
                item = json.loads(stripped)
            except (ValueError, RecursionError) as error:
                if _is_cut_short(stripped, error):
                    continue
                raise DataError(f"{path}:{number} is no JSON object ({error}); remove the line.") from error
            if not isinstance(item, dict):
                raise DataError(f"{path}:{number} is no JSON object; remove the line.")
            yield number, item


def _is_cut_short(line: bytes, error: Exception) -> bool:
    """Return whether a line begins an object and ends before it does, if only after a brace inside it."""
    if not line.startswith(b"{"):
        return False
    if not line.endswith(b"}"):
        return True
    # in a text, or after the end of an object inside this one
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(error.doc) or error.msg.startswith("Unterminated string")
