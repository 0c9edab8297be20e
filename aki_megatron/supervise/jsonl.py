"""Files of JSON lines that survive a crash in the middle of a write, and a damaged line."""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aki_megatron.errors import DataError

logger = logging.getLogger("aki_megatron.supervise")

MAX_SHOWN_CHARACTERS = 60
"""Characters of a damaged line that a message repeats."""


Check = Callable[[Mapping[str, Any]], object]
"""Whether a line has the fields that its reader needs: falsy or KeyError where it does not."""


def has_step(line: Mapping[str, Any]) -> bool:
    """Return whether a line is about a step."""
    return type(line["step"]) is int


def read_lines(path: Path, check: Check = lambda line: True) -> list[dict[str, Any]]:
    """Return every complete line; a last line truncated by a crash is left out. A missing file has no lines.

    Raises DataError that names the file and the line where one is no JSON object, or ``check`` refuses it, or where the
    file cannot be read.
    """
    return [parse_line(path, number, line, check) for number, line in _complete_lines(path)]


def read_intact_lines(path: Path, check: Check) -> list[dict[str, Any]]:
    """Return every complete line that is a JSON object and passes ``check``; log the others.

    Raises DataError where the file cannot be read.
    """
    found = []
    for number, line in _complete_lines(path):
        try:
            found.append(parse_line(path, number, line, check))
        except DataError as error:
            logger.warning("left out: %s", error)
    return found


def parse_line(path: Path, number: int, line: bytes, check: Check) -> dict[str, Any]:
    """Return the object in line ``number`` of a file, counted from 1. Raises DataError that names both."""
    try:
        content = json.loads(line)
        if not isinstance(content, dict) or not check(content):
            raise _damage(path, number, line)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _damage(path, number, line) from None
    return content


def _damage(path: Path, number: int, line: bytes) -> DataError:
    shown = line.decode("utf-8", "backslashreplace")
    shown = shown if len(shown) <= MAX_SHOWN_CHARACTERS else shown[:MAX_SHOWN_CHARACTERS] + "..."
    return DataError(f"{path}: line {number} is damaged: {shown!r}; correct or delete the line.")


def _complete_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error
    # what follows the last newline was never finished
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if line.strip():
            yield number, line


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append to a short file in one write, after removing a last line truncated by a crash.

    Raises OSError where the file cannot be written; a full disk leaves no part of the line.
    """
    if path.exists():
        content = path.read_bytes()
        if (complete := content.rfind(b"\n") + 1) != len(content):
            os.truncate(path, complete)
    with path.open("ab", buffering=0) as file:
        text = (json.dumps(line) + "\n").encode()
        if (written := file.write(text)) != len(text):
            os.truncate(path, file.tell() - (written or 0))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def discard_steps_after(path: Path, step: int) -> None:
    """Drop the lines whose ``step`` is greater than ``step``: those steps are repeated, and each may appear once.

    Damaged lines are moved to a file beside it, FILE.damaged, and logged: whoever reads the rest finds the gap.
    """
    kept, damaged = [], []
    for number, line in _complete_lines(path):
        try:
            content = parse_line(path, number, line, has_step)
        except DataError as error:
            logger.warning("moved to %s: %s", damaged_file(path), error)
            damaged.append(line)
        else:
            if content["step"] <= step:
                kept.append(line)
    if damaged:
        with damaged_file(path).open("ab") as file:
            file.write(_joined(damaged))
    joined = _joined(kept)
    if path.exists() and path.read_bytes().startswith(joined):  # needs no space on a full disk
        os.truncate(path, len(joined))
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(joined)
    os.replace(temporary, path)


def damaged_file(path: Path) -> Path:
    """Return where the damaged lines of a file are kept."""
    return path.with_name(f"{path.name}.damaged")


def _joined(lines: Sequence[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)
