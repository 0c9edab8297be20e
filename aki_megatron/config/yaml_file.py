"""YAML as a person expects it: 1e-4 is a number, a duplicate key is an error, and the line of every key is known.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``no`` is false and ``010`` is eight. The scalars here are those
of YAML 1.2's core schema, plus underscores in whole numbers (``275_000``).
"""

# ruamel.yaml also reads YAML 1.2 and keeps lines, but not as exactly: 010 is ten and 2024-01-01 a date, only the first
# duplicate key is reported, aliases are followed, and values are classes of its own that PyYAML cannot write back.

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aki_megatron.config.nested import Location, check_depth, dotted
from aki_megatron.errors import ConfigError

NESTED = "its values are nested too deeply to be read."

SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9]+(?:[eE][-+]?[0-9]+)?"
        r"|\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN",
        "-+0123456789.",
    ),
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
}
"""Tag -> (pattern of the whole scalar, characters it may begin with)."""


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above; a file cannot name Python objects."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Raise ComposerError for an alias: every value is written out, and no value contains itself."""
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            message = "aliases (*name) are not read; write the value out"
            raise yaml.composer.ComposerError(None, None, message, event.start_mark)
        return super().compose_node(parent, index)


for tag, (pattern, first) in SCALARS.items():
    Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), ["" if c == "\0" else c for c in first])


@dataclass(frozen=True)
class Document:
    """A YAML file: its values, and the line (from 1) of every key and list element."""

    path: Path
    values: dict[str, Any]
    lines: Mapping[Location, int]


def read_yaml(path: Path) -> Document:
    """Read a file whose root is a mapping.

    Raises ConfigError naming file and line: no such file, broken YAML, a duplicate key, a key that is not a name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file (--config takes a YAML file of a complete run).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}.") from None
    try:
        root = yaml.compose(text, Loader=Loader)
        problems, lines = _lines_of_keys(root)
        if problems:
            raise ConfigError(f"{path}: " + "; ".join(problems) + ".")
        values = yaml.load(text, Loader=Loader)
        check_depth(values)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is not YAML: {_one_line(error)}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: {NESTED}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{path}: holds a value that cannot be read: {error}.") from None
    except ConfigError as error:
        raise error if str(error).startswith(str(path)) else ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        got = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{path}: a run is a mapping of sections (run, data, train, ...), got {got}.")
    return Document(path, values, lines)


def read_value(text: str) -> Any:
    """Return the value of a text as a YAML file would hold it; text that is no YAML is returned as it is.

    Raises ConfigError for a value that is nested too deeply, or a number of thousands of digits.
    """
    try:
        value = yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        return text
    except RecursionError:
        raise ConfigError(NESTED) from None
    except ValueError as error:
        raise ConfigError(f"the value cannot be read: {error}.") from None
    check_depth(value)
    return value


def _lines_of_keys(root: yaml.Node | None) -> tuple[list[str], dict[Location, int]]:
    """Return a sentence per duplicate or malformed key, and the line of each key and list element."""
    problems: list[str] = []
    lines: dict[Location, int] = {}
    open_nodes: list[tuple[Location, yaml.Node | None]] = [((), root)]
    while open_nodes:
        location, node = open_nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                lines[(*location, index)] = child.start_mark.line + 1
                open_nodes.append(((*location, index), child))
        elif isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                line = key.start_mark.line + 1
                if key.tag != "tag:yaml.org,2002:str":
                    problems.append(f"line {line}: a key must be a name, got {key.value!r}")
                    continue
                path = (*location, key.value)
                if path in lines:
                    problems.append(f"line {line}: {dotted(path)} is already on line {lines[path]}; keep one of them")
                lines.setdefault(path, line)
                open_nodes.append((path, child))
    return problems, lines


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
