"""Configuration fields as text: what a key may hold, and what a person may have meant by a wrong one.

pydantic describes types as JSON schema or with one message per member of a union; these sentences are for people.
"""

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from aki_megatron.config.section import AtMost, OneOf
from aki_megatron.masking import mask_values

OMITTED = " ... "

PLAIN = {
    int: ("a whole number", "INT"),
    float: ("a number", "NUMBER"),
    bool: ("true or false", "true|false"),
    str: ("text", "TEXT"),
    Path: ("a path", "PATH"),
}
"""Type -> (text in a sentence, metavar on the command line)."""

BOUNDS: tuple[tuple[type, str, str], ...] = (
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.Le, "le", "<="),
)
"""(class of the bound, attribute that holds it, sign)."""


def section_class(annotation: Any) -> type[BaseModel] | None:
    """Return the section class that a field holds, one that null may replace included, or None for a value."""
    if get_origin(annotation) in (Union, UnionType) and NoneType in get_args(annotation):
        annotation, *others = [inner for inner in get_args(annotation) if inner is not NoneType]
        if others:
            return None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted key, field) of every key that holds a value, in the order of the classes."""
    for name, info in model.model_fields.items():
        inner = section_class(info.annotation)
        if inner is None:
            yield prefix + name, info
        else:
            yield from fields(inner, f"{prefix}{name}.")


def _parts(annotation: Any, metadata: Iterable[Any] = ()) -> tuple[list[Any], list[Any], bool]:
    """Return the types without Annotated and None, their metadata (bounds), and whether None is allowed."""
    if get_origin(annotation) is Annotated:
        return _parts(annotation.__origin__, [*metadata, *annotation.__metadata__])
    if get_origin(annotation) in (Union, UnionType):
        inner = [_parts(a) for a in get_args(annotation) if a is not NoneType]
        types = [t for found, _, _ in inner for t in found]
        return types, [m for _, found, _ in inner for m in found], NoneType in get_args(annotation)
    return [annotation], list(metadata), False


def _bounds(metadata: Iterable[Any]) -> str:
    texts = [f"{sign} {getattr(m, name)}" for m in metadata for kind, name, sign in BOUNDS if isinstance(m, kind)]
    return (" " + " and ".join(texts)) if texts else ""


def _one(annotation: Any, metadata: Iterable[Any] = ()) -> tuple[str, str]:
    arguments = get_args(annotation)
    registries = [m.registry for m in metadata if isinstance(m, OneOf)]
    if registries or get_origin(annotation) is Literal:
        names = [str(a) for a in (registries[0] if registries else arguments)]
        return f"one of {', '.join(names)}", "|".join(names)
    if annotation in PLAIN:
        return PLAIN[annotation]
    if get_origin(annotation) is tuple:
        inner = section_class(arguments[0])
        if inner is not None:
            return f"a list of {{{', '.join(inner.model_fields)}}}", "LIST"
        types, metadata, _ = _parts(arguments[0])
        return f"a list, each {_one(types[0])[0]}{_bounds(metadata)}", "LIST"
    inner = section_class(annotation)
    if inner is not None:
        return f"a mapping with the keys {', '.join(inner.model_fields)}", "MAPPING"
    return "a mapping", "MAPPING"


def allowed(info: FieldInfo) -> str:
    """Return what a field may hold, to follow "must be": ``a number > 0``, ``one of bf16, fp32``."""
    types, metadata, optional = _parts(info.annotation, info.metadata)
    return " or ".join(_one(t, metadata)[0] + _bounds(metadata) for t in types) + (" or null" if optional else "")


def metavar(info: FieldInfo) -> str:
    """Return the same for the command line, short: ``NUMBER``, ``bf16|fp32``."""
    types, metadata, _ = _parts(info.annotation, info.metadata)
    return "|".join(_one(t, metadata)[1] for t in types)


def upper_limit(info: FieldInfo) -> int:
    """Return the largest value of a number that has such a limit."""
    return int(min(m.limit for m in _parts(info.annotation, info.metadata)[1] if isinstance(m, AtMost)))


def is_text(info: FieldInfo) -> bool:
    """Return whether the text of a flag is the value itself, not YAML: names and paths."""
    types, _, _ = _parts(info.annotation, info.metadata)
    return all(t in (str, Path) for t in types)


def is_path(info: FieldInfo) -> bool:
    """Return whether a field holds a path."""
    types, _, _ = _parts(info.annotation, info.metadata)
    return types == [Path]


def without_null(annotation: Any) -> Any:
    """Return the type of a value other than null, where there is one such type."""
    types, _, _ = _parts(annotation)
    return types[0] if len(types) == 1 else annotation


def takes_null(info: FieldInfo) -> bool:
    """Return whether null is a value of the field."""
    return _parts(info.annotation, info.metadata)[2]


def format_value(value: Any, max_characters: int = 80) -> str:
    """Return a value as YAML and JSON write it, for messages; secrets are masked, long ones lose their middle.

    The end stays, because paths differ there.
    """
    value = mask_values(str(value) if isinstance(value, Path) else value)
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    half = (max_characters - len(OMITTED)) // 2
    return text if len(text) <= max_characters else text[:half] + OMITTED + text[-half:]


def suggestion(key: str, known: Iterable[str]) -> str:
    """Return ``; did you mean data.root?`` for an unknown dotted key, or the keys of its section."""
    candidates = list(known)
    parent, _, last = key.rpartition(".")
    siblings = [k for k in candidates if k.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.75)
    elsewhere = [k for k in candidates if k.rpartition(".")[2] == last]
    far = difflib.get_close_matches(key, candidates, n=1, cutoff=0.7)
    for found in (near, elsewhere, far):
        if found:
            return f"; did you mean {' or '.join(found[:3])}?"
    names = [k.rpartition(".")[2] for k in siblings]
    return f"; the keys of {parent} are {', '.join(names)}." if parent and names else "."


def element_class(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of a list's elements, or None."""
    types, _, _ = _parts(annotation)
    found = [section_class(get_args(t)[0]) for t in types if get_origin(t) is tuple]
    return found[0] if found else None


def list_problems(where: str, problems: Sequence[str]) -> str:
    """Return one message for all ``problems`` of the file or command line ``where``."""
    if len(problems) == 1:
        return f"{where}: {problems[0]}"
    return "\n".join([f"{where}: {len(problems)} problems", *(f"  - {problem}" for problem in problems)])
