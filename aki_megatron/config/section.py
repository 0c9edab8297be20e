"""The base of every part of a run configuration."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveInt


class Section(BaseModel):
    """Frozen and strict: no unknown keys, no silent conversion (the string "8" is not the number 8).

    The docstring under a field is its help text.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


FilePath = Annotated[Path, BeforeValidator(_path)]
"""A path; YAML and flags write it as a string."""

Floats = Annotated[tuple[float, ...], BeforeValidator(_tuple)]
Counts = Annotated[tuple[PositiveInt, ...], BeforeValidator(_tuple)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_tuple)]
