"""A run YAML and the files it is based on, resolved to one mapping that remembers where every key stands.

``base: other.yaml`` (relative to the file that says so) takes every value of another file. Mappings merge key by key;
lists and scalars replace. A base may have a base of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.config.nested import Location, merge
from aki_megatron.config.yaml_file import Document, read_yaml
from aki_megatron.errors import ConfigError

BASE = "base"
"""The key that names the file a run is based on."""


@dataclass(frozen=True)
class RunFile:
    """The values of a run YAML with those of its bases, and the file and line of every key and list element."""

    path: Path
    values: dict[str, Any]
    origins: Mapping[Location, tuple[Path, int]]

    def prefix(self, location: Location) -> str:
        """Return ``line 5: `` or ``base.yaml line 5: `` for an error about ``location``; empty where nothing is known.

        The line of a missing key is that of the section around it.
        """
        for length in range(len(location), 0, -1):
            if origin := self.origins.get(location[:length]):
                path, line = origin
                return f"line {line}: " if path == self.path else f"{path} line {line}: "
        return ""


def read_run_file(path: Path, *, based_on_by: tuple[Path, ...] = ()) -> RunFile:
    """Read a run YAML and resolve its ``base``; ``based_on_by`` is the chain of files that led here.

    Raises ConfigError naming file and line: unreadable YAML, a base that is missing or no path, a circle of bases.
    """
    document = read_yaml(path)
    origins = {location: (path, line) for location, line in document.lines.items() if location[0] != BASE}
    if BASE not in document.values:
        return RunFile(path, document.values, origins)
    base_path = _base_path(document, based_on_by)
    base = read_run_file(base_path, based_on_by=(*based_on_by, path))
    own = {key: value for key, value in document.values.items() if key != BASE}
    kept = {location: origin for location, origin in base.origins.items() if not _replaced(location, own)}
    return RunFile(path, merge(base.values, own), kept | origins)


def _base_path(document: Document, based_on_by: tuple[Path, ...]) -> Path:
    where = f"{document.path}: line {document.lines[(BASE,)]}: base"
    base = document.values[BASE]
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{where} must be the path of a YAML file, relative to this one; got {base!r}.")
    path = document.path.parent / base
    chain = [*based_on_by, document.path]
    if path.resolve() in [file.resolve() for file in chain]:
        circle = " -> ".join(str(file) for file in [*chain, path])
        raise ConfigError(f"{where} goes round in a circle: {circle}; remove one of these bases.")
    if not path.is_file():
        raise ConfigError(
            f"{where}: {base}: there is no such file (looked for {path}; the path is relative to this file)."
        )
    return path


def _replaced(location: Location, own: Any) -> bool:
    """Whether ``own`` puts another value where a base has ``location``, other than a mapping that merges."""
    for part in location:
        if not isinstance(own, Mapping):
            return True
        if part not in own:
            return False
        own = own[part]
    return not isinstance(own, Mapping)
