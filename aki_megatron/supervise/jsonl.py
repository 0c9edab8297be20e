"""Files of JSON lines that survive a crash in the middle of a write."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return every complete line; a last line truncated by a crash is left out. A missing file has no lines."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    # what follows the last newline was never finished
    return [json.loads(line) for line in lines[:-1] if line]


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append to a short file in one write, after removing a last line truncated by a crash."""
    if path.exists():
        content = path.read_bytes()
        if (complete := content.rfind(b"\n") + 1) != len(content):
            os.truncate(path, complete)
    with path.open("ab", buffering=0) as file:
        file.write((json.dumps(line) + "\n").encode())


def discard_steps_after(path: Path, step: int) -> None:
    """Drop the lines whose ``step`` is greater than ``step``: those steps are repeated, and each may appear once."""
    kept = [line for line in read_lines(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
    os.replace(temporary, path)
