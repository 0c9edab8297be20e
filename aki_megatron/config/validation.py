"""Values to a checked RunConfig, with every problem of a file in one message."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from aki_megatron.config.cross_checks import ContradictionError, report
from aki_megatron.config.field_info import allowed, element, fields, sections, shown, suggestion
from aki_megatron.config.run import RunConfig
from aki_megatron.config.yaml_file import Location
from aki_megatron.errors import ConfigError

KEYS: dict[str, FieldInfo] = dict(fields(RunConfig))
"""Every dotted key of a run."""

ADAPTERS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(info.annotation or Any) for name, info in RunConfig.model_fields.items()
}
"""A validator per section."""


def dotted(location: Iterable[str | int]) -> str:
    """``data.sources[0].weight``"""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".")


def _walk(location: Location) -> tuple[Location, FieldInfo | None, type[BaseModel] | None]:
    """The longest part of a pydantic location that names keys, its field, and the section around it.

    pydantic appends names of union members and validators; they are no keys.
    """
    model: type[BaseModel] | None = RunConfig
    around: type[BaseModel] | None = None
    info: FieldInfo | None = None
    known: list[str | int] = []
    for part in location:
        if isinstance(part, int) and info is not None and model is None:
            known.append(part)
            model = element(info.annotation)
        elif isinstance(part, str) and model is not None and part in model.model_fields:
            known.append(part)
            around, info = model, model.model_fields[part]
            model = sections(info.annotation)
        elif isinstance(part, str) and model is not None:
            return (*known, part), None, model
        else:
            break
    return tuple(known), info, around


def sentence(error: ErrorDetails) -> tuple[Location, str]:
    """Where a value is wrong, and a sentence about it: the key, what was got, what is allowed."""
    location, info, around = _walk(error["loc"])
    key = dotted(location)
    if error["type"] == "extra_forbidden":
        assert around is not None
        beside = [dotted((*location[:-1], name)) for name in around.model_fields]
        return location, f"unknown key {key}{suggestion(key, [*beside, *(k for k in KEYS if k not in beside)])}"
    if info is None:
        return location, f"{key}: {error['msg']}."
    if error["type"] == "missing":
        help_text = f" ({info.description.splitlines()[0].rstrip('.')})" if info.description else ""
        return location, f"{key} is missing: give {allowed(info)}{help_text}."
    must = allowed(info)
    if isinstance(location[-1], int):
        must = f"as in {dotted(location[:-1])}: {must}"
    return location, f"{key} must be {must}; got {shown(error['input'])}."


def build_sections(
    values: Mapping[str, Any],
    describe: Callable[[Location], str],
    wanted: Iterable[str] = tuple(RunConfig.model_fields),
) -> tuple[dict[str, Any], list[str]]:
    """Each wanted section on its own, so that all problems are found at once; ``describe`` says where a key stands."""
    built: dict[str, Any] = {}
    problems: dict[Location, str] = {}
    for name in values:
        if name not in RunConfig.model_fields:
            # Strangers at the root stand under a name of their own in pydantic's words, too.
            problems[(name,)] = f"unknown key {name}{suggestion(name, [*RunConfig.model_fields, *KEYS])}"
    for name in wanted:
        info = RunConfig.model_fields[name]
        if name not in values:
            if info.default is PydanticUndefined:
                inner = sections(info.annotation)
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
    return built, [describe(location) + text for location, text in problems.items()]


def values_of(built: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of a run's sections as YAML holds it, sections that were left out at their defaults."""
    values: dict[str, Any] = {}
    for name, info in RunConfig.model_fields.items():
        part = built.get(name, info.default)
        values[name] = part.model_dump(mode="json") if isinstance(part, BaseModel) else part
    return values


def build(values: Mapping[str, Any], where: str) -> RunConfig:
    """The run that ``values`` describe. Raises ConfigError with all problems, headed by ``where``."""
    built, problems = build_sections(values, lambda _: "")
    if problems:
        raise ConfigError(report(where, problems))
    try:
        return RunConfig(**built)
    except ContradictionError as error:
        raise ConfigError(report(where, error.problems)) from None
