"""Tables of Markdown pages that are generated from the configuration's tables."""

import json
from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return a table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body]) + "\n"


def link(path: str) -> str:
    """Return a link from a page in docs/ to a file, by its name; ``path`` is relative to the root."""
    return f"[{path.rpartition('/')[2]}](../{path})"


def code(value: object) -> str:
    """Return a value as JSON writes it."""
    return f"`{json.dumps(value)}`"
