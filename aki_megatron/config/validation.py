"""Values of a file to a checked RunConfig, with every problem in one message."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from aki_megatron.config.cross_checks import contradictions
from aki_megatron.config.field_info import (
    allowed,
    element_class,
    fields,
    format_value,
    list_problems,
    section_class,
    suggestion,
    upper_limit,
    without_null,
)
from aki_megatron.config.moved_keys import moved_keys
from aki_megatron.config.nested import Location, dotted
from aki_megatron.config.run import RunConfig
from aki_megatron.errors import ConfigError
from aki_megatron.masking import mask_values

KEYS: dict[str, FieldInfo] = dict(fields(RunConfig))
"""Dotted key -> field, for every key of a run that holds a value."""

ADAPTERS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(info.annotation or Any) for name, info in RunConfig.model_fields.items()
}
"""Section -> its validator."""


def _walk(location: Location) -> tuple[Location, FieldInfo | None, type[BaseModel] | None]:
    """Return the longest part of a pydantic location that names keys, its field, and the section around it.

    pydantic appends names of union members and validators, which are no keys.
    """
    model: type[BaseModel] | None = RunConfig
    around: type[BaseModel] | None = None
    info: FieldInfo | None = None
    known: list[str | int] = []
    for part in location:
        if isinstance(part, int) and info is not None and model is None:
            known.append(part)
            model = element_class(info.annotation)
        elif isinstance(part, str) and model is not None and part in model.model_fields:
            known.append(part)
            around, info = model, model.model_fields[part]
            model = section_class(without_null(info.annotation))
        elif isinstance(part, str) and model is not None:
            return (*known, part), None, model
        else:
            break
    return tuple(known), info, around


def sentence(error: ErrorDetails) -> tuple[Location, str]:
    """Return where a value is wrong, and a sentence about it: the key, what was got, what is allowed."""
    location, info, around = _walk(error["loc"])
    key = dotted(location)
    if error["type"] == "extra_forbidden":
        assert around is not None
        siblings = [dotted((*location[:-1], name)) for name in around.model_fields]
        return location, f"unknown key {key}{suggestion(key, [*siblings, *(k for k in KEYS if k not in siblings)])}"
    if info is None:
        return location, f"{key}: {error['msg']}."
    if error["type"] == "missing":
        help_text = f" ({info.description.splitlines()[0].rstrip('.')})" if info.description else ""
        return location, f"{key} is missing: give {allowed(info)}{help_text}."
    if error["type"] == "at_most":
        return location, f"{key} must be at most {upper_limit(info):,}; got {format_value(error['input'])}."
    must = allowed(info)
    if isinstance(location[-1], int):
        must = f"as in {dotted(location[:-1])}: {must}"
    value = error["input"]
    hint = f"; write {value:.0f}" if error["type"] == "int_type" and is_whole(value) else ""
    return location, f"{key} must be {must}; got {format_value(value)}{hint}."


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number that is written as a fraction, such as 3.0."""
    return isinstance(value, float) and math.isfinite(value) and value == int(value)


def build_sections(
    values: Mapping[str, Any],
    prefix: Callable[[Location], str],
    wanted: Iterable[str] = tuple(RunConfig.model_fields),
) -> tuple[dict[str, Any], list[str]]:
    """Validate each wanted section on its own; return the sections by name, and all problems.

    ``prefix`` returns where a key stands, to precede its problem. Renamed keys are reported alone: a key that seems to
    be missing may be there under its old name.
    """
    if moved := list(moved_keys(values)):
        return {}, [prefix(location) + text for location, text in moved]
    built: dict[str, Any] = {}
    problems: dict[Location, str] = {}
    for name in values:
        if name not in RunConfig.model_fields:
            problems[(name,)] = f"unknown key {name}{suggestion(name, [*RunConfig.model_fields, *KEYS])}"
    for name in wanted:
        info = RunConfig.model_fields[name]
        if name not in values:
            if info.default is PydanticUndefined:
                inner = section_class(info.annotation)
                keys = f": give {', '.join(inner.model_fields)}" if inner else ""
                problems[(name,)] = f"the section {name} is missing{keys}."
            continue
        try:
            built[name] = ADAPTERS[name].validate_python(values[name])
        except ValidationError as error:
            for details in error.errors():
                location, text = sentence({**details, "loc": (name, *details["loc"])})
                problems.setdefault(location, text)
        except ConfigError as error:
            problems[(name, "")] = str(error)
    return built, [prefix(location) + text for location, text in problems.items()]


def values_of(built: Mapping[str, Any]) -> dict[str, Any]:
    """Return every value of a run's sections as YAML holds it, sections that were left out at their defaults."""
    values: dict[str, Any] = {}
    for name, info in RunConfig.model_fields.items():
        part = built.get(name, info.default)
        values[name] = part.model_dump(mode="json") if isinstance(part, BaseModel) else part
    return values


def build_run(values: Mapping[str, Any], where: str) -> RunConfig:
    """Return the checked run that ``values`` describe. Raises ConfigError with all problems, headed by ``where``.

    Secrets among the values are known from then on: mask_text removes them from whatever this process writes.
    """
    mask_values(values)
    built, problems = build_sections(values, lambda _: "")
    if problems:
        raise ConfigError(list_problems(where, problems))
    run = RunConfig(**built)
    if problems := contradictions(run):
        raise ConfigError(list_problems(where, problems))
    return run
