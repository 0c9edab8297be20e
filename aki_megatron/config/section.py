"""Base class and field types of the sections of a run configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import annotated_types
from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Section(BaseModel):
    """Frozen and strict: unknown keys and silent conversions (the string "8" to the number 8) are errors.

    The docstring under a field is its text in --help.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


@dataclass(frozen=True)
class AtMost:
    """Annotates a number with a limit that only a mistake exceeds; the lowest is named where a value does."""

    limit: float

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if value > self.limit:
            raise PydanticCustomError("at_most", "Input should be at most {limit}", {"limit": self.limit})
        return value


PositiveInt = Annotated[int, annotated_types.Gt(0), AtMost(2**31 - 1)]
NonNegativeInt = Annotated[int, annotated_types.Ge(0), AtMost(2**31 - 1)]
Seed = Annotated[int, annotated_types.Ge(0), AtMost(2**63 - 1)]
Seconds = Annotated[float, annotated_types.Gt(0), AtMost(10**9)]
Weight = Annotated[float, annotated_types.Gt(0), AtMost(10**9)]
Gigabytes = Annotated[float, annotated_types.Gt(0), AtMost(10**9)]


def _path(value: Any) -> Any:
    # an empty path would be the working directory, and no path holds a null character
    return Path(value) if isinstance(value, str) and value.strip() and "\0" not in value else value


def no_stand_in(value: Any) -> Any:
    """Refuse true and 1.0 for 1, which Python takes for equal: a validator before that of a literal number."""
    if isinstance(value, bool | float):
        raise PydanticCustomError("literal_error", "Input should be a whole number")
    return value


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple, anything else as it is: a validator before the field's own."""
    return tuple(value) if isinstance(value, list) else value


FilePath = Annotated[Path, BeforeValidator(_path)]
"""A path, written as a string in YAML and flags."""

Floats = Annotated[tuple[float, ...], BeforeValidator(as_tuple)]
Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(as_tuple)]
Strings = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]


@dataclass(frozen=True)
class OneOf:
    """Annotates a text field that holds a key of a registry; the registry is read whenever a value is checked."""

    registry: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: str) -> str:
        if value not in self.registry:
            names = ", ".join(self.registry)
            raise PydanticCustomError("one_of", "Input should be one of {names}", {"names": names})
        return value
