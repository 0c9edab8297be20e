"""Read a dataclass from a small JSON file that a crash, a full disk or a user may have damaged."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

Record = TypeVar("Record")


def read_record(kind: type[Record], path: Path) -> Record | None:
    """Return the record in a file; None where the file is missing, unreadable, incomplete or of another form."""
    try:
        return parse_record(kind, json.loads(path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None


def parse_record(kind: type[Record], content: Any) -> Record:
    """Build a dataclass whose fields are numbers, texts and booleans. Raises ValueError for any other content."""
    if not isinstance(content, Mapping):
        raise ValueError(f"not an object: {content!r}")
    hints, values = get_type_hints(kind), {}
    for each in fields(kind):  # type: ignore[arg-type]
        if each.name not in content:
            if each.default is MISSING and each.default_factory is MISSING:
                raise ValueError(f"{each.name} is missing")
            continue
        value, expected = content[each.name], hints[each.name]
        accepted: tuple[type, ...] = (int, float) if expected is float else (expected,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
            raise ValueError(f"{each.name} is {value!r}")
        values[each.name] = value
    return kind(**values)
