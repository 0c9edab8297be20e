"""The categories of words, as categories.yaml or a file of the same form has them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aki_megatron.config.yaml_file import read_yaml
from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.attention_analysis.words import Word

DEFAULT_FILE = Path(__file__).with_name("categories.yaml")

INSTRUCTION = "(instruction)"
"""What words of a constant instruction count as, apart from the categories."""

KEYS = ("categories", "rest", "words", "instructions")


@dataclass(frozen=True)
class Categories:
    """Which category a word counts in.

    names         in the order of the reports
    of_tags       Penn tag -> category
    of_words      word in lower case -> category, whatever its tag
    rest          category of all other tags
    instructions  constant texts whose words count apart
    """

    names: tuple[str, ...]
    of_tags: Mapping[str, str]
    of_words: Mapping[str, str]
    rest: str
    instructions: tuple[str, ...]

    def find(self, word: str, tag: str) -> str:
        """Return the category of a word with this tag."""
        plain = word.lower().replace("\u2019", "'")
        return self.of_words.get(plain) or self.of_tags.get(tag, self.rest)

    def instruction_words(self, words: Sequence[Word], text: str) -> list[bool]:
        """Return of each word of a text whether it belongs to a constant instruction; white space is taken as equal."""
        spans = [found.span() for pattern in map(_pattern, self.instructions) for found in pattern.finditer(text)]
        return [any(start <= word.start and word.end <= end for start, end in spans) for word in words]


def _pattern(instruction: str) -> re.Pattern[str]:
    return re.compile(r"\s+".join(map(re.escape, instruction.split())), re.IGNORECASE)


def load_categories(path: Path = DEFAULT_FILE) -> Categories:
    """Read a file of categories.

    Raises ConfigError naming the file: unknown or missing keys, values of another form, a tag or word in two
    categories, words or a rest in a category that is not listed.
    """
    values = read_yaml(path).values
    if wrong := sorted(set(values) ^ set(KEYS)):
        raise ConfigError(f"{path}: keys must be {', '.join(KEYS)}; missing or unknown: {', '.join(wrong)}.")
    tags, words, rest = _lists(path, values, "categories"), _lists(path, values, "words"), values["rest"]
    names = tuple(tags)
    if unknown := [name for name in (*words, rest) if name not in names]:
        raise ConfigError(f"{path}: {unknown[0]!r} is no category; categories has {', '.join(names)}.")
    return Categories(
        names,
        _inverse(path, "tag", tags),
        _inverse(path, "word", {name: [word.lower() for word in entries] for name, entries in words.items()}),
        rest,
        tuple(_texts(path, "instructions", values["instructions"])),
    )


def _lists(path: Path, values: Mapping[str, Any], key: str) -> dict[str, list[str]]:
    if not isinstance(values[key], Mapping):
        raise ConfigError(f"{path}: {key} must map categories to lists, got {values[key]!r}.")
    return {name: _texts(path, f"{key}: {name}", entries) for name, entries in values[key].items()}


def _texts(path: Path, where: str, entries: Any) -> list[str]:
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ConfigError(f"{path}: {where} must be a list of texts, got {entries!r}; put numbers in quotes.")
    return entries


def _inverse(path: Path, kind: str, entries: Mapping[str, Sequence[str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, members in entries.items():
        for member in members:
            if found.setdefault(member, name) != name:
                raise ConfigError(f"{path}: {kind} {member!r} is in {found[member]} and in {name}; keep one of them.")
    return found
