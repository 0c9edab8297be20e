"""YAML as a person expects it: 1e-4 is a number, a key written twice is an error, every key knows its line.

PyYAML follows YAML 1.1, where ``1e-4`` is a string, ``no`` is false and ``010`` is eight. The scalars here are those
of YAML 1.2's core schema, plus underscores in whole numbers (``275_000``).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aki_megatron.errors import ConfigError

Location = tuple[str | int, ...]
"""Keys and list indices from the root of a document to a value."""

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
"""Tag -> (pattern of the whole scalar, its possible first characters)."""


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars above; nothing in a file can name a Python object."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuse aliases: a run says every value where it stands, and a value cannot hold itself."""
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()
            message = "aliases (*name) are not read; write the value out"
            raise yaml.composer.ComposerError(None, None, message, event.start_mark)
        return super().compose_node(parent, index)


for tag, (pattern, first) in SCALARS.items():
    Loader.add_implicit_resolver(tag, re.compile(f"^(?:{pattern})$"), ["" if c == "\0" else c for c in first])


@dataclass(frozen=True)
class Document:
    """A YAML file: its values, and the line (counted from 1) of every key and list element."""

    path: Path
    values: dict[str, Any]
    lines: Mapping[Location, int]


def read_yaml(path: Path) -> Document:
    """Read a file whose root is a mapping.

    Raises ConfigError naming the file and the line: no such file, broken YAML, a key twice, a key that is no name.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file (--config takes a YAML file of a complete run).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}.") from None
    try:
        root = yaml.compose(text, Loader=Loader)
        problems, lines = _survey(root)
        if problems:
            raise ConfigError(f"{path}: " + "; ".join(problems) + ".")
        values = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: this is not YAML: {_one_line(error)}.") from None
    if not isinstance(values, dict):
        got = "nothing" if values is None else type(values).__name__
        raise ConfigError(f"{path}: a run is a mapping of sections (run, data, train, ...), got {got}.")
    return Document(path, values, lines)


def read_value(text: str) -> Any:
    """One value as it would stand in a YAML file; text that is no YAML is itself."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        return text


def _survey(root: yaml.Node | None) -> tuple[list[str], dict[Location, int]]:
    """Keys that are wrong in themselves, and the line of each value."""
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
                place = (*location, key.value)
                if place in lines:
                    dotted = ".".join(map(str, place))
                    problems.append(f"line {line}: {dotted} stands already on line {lines[place]}; keep one of them")
                lines.setdefault(place, line)
                open_nodes.append((place, child))
    return problems, lines


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())
