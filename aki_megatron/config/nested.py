"""Nested mappings and lists as YAML and JSON hold them: flatten to dotted keys, set a dotted key, merge two."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from aki_megatron.errors import ConfigError

MAX_DEPTH = 32
"""Levels of mappings and lists; no configuration needs half as many, and recursive readers fail at a few hundred."""

Location = tuple[str | int, ...]
"""Keys and list indices from the root of a document to a value."""


def dotted(location: Iterable[str | int]) -> str:
    """Return a location as text: ``data.sources[0].weight``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def flatten(values: Mapping[str, Any], *, open_lists: bool = False, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of every leaf.

    Empty mappings are leaves, and so are lists. With ``open_lists`` a list that holds mappings is entered, and its
    indices are parts of the keys: ``data.sources.0.weight``.
    """
    for key, value in values.items():
        if open_lists and isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(index): item for index, item in enumerate(value)}
        if isinstance(value, Mapping) and value:
            yield from flatten(value, open_lists=open_lists, prefix=f"{prefix}{key}.")
        else:
            yield prefix + key, value


def set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    """Set ``values[a][b][c]`` for the key ``a.b.c``; create mappings that are missing or null on the way."""
    *path, last = key.split(".")
    inner = values
    for part in path:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
    inner[last] = value


def merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``under`` with the values of ``over``: mappings merge key by key, everything else is replaced."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def check_depth(values: Any) -> None:
    """Raise ConfigError where mappings and lists are nested more than MAX_DEPTH levels deep."""
    level = [values]
    for _ in range(MAX_DEPTH):
        level = [inner for value in level for inner in _children(value)]
        if not level:
            return
    raise ConfigError(f"its values are nested more than {MAX_DEPTH} levels deep.")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list) else ()
