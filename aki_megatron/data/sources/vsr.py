"""VSR: is a spatial statement about a COCO image true? https://github.com/cambridgeltl/visual-spatial-reasoning"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.json_stream import refuse_foreign
from aki_megatron.data.sources.records import (
    MAX_SHOWN,
    DatasetReader,
    LazyConversations,
    PackedRecords,
    parse_entries,
    safe_path,
    text_field,
)
from aki_megatron.errors import DataError
from aki_megatron.types import BYTE_ORDER_MARK, Conversation, Turn, image_items

PROMPT = "Answer the question using a single word or phrase. {question} Please answer yes or no."
ANSWERS = ("no", "yes")

FOLDERS = {"train2017": "A-OKVQA/train2017", "val2017": "vsr/val2017"}
"""COCO folder in ``image_link`` -> folder under the data root (VSR shares the training images of A-OKVQA)."""

FILES = {
    "train": ("vsr/train-random.jsonl", *FOLDERS.values()),
    "val": ("vsr/dev-random.jsonl", *FOLDERS.values()),
}

_VERB = re.compile(r"\s(is|are)\s")
_DETERMINERS = {"The", "A", "An", "This", "That", "These", "Those", "There", "Some", "One", "Two"}


class _Statement(NamedTuple):
    line: int
    image: str
    caption: str
    label: int


def read(root: Path, split: str) -> LazyConversations[_Statement]:
    """Read the statements of a split as yes/no questions, one a line."""
    file = root / FILES[split][0]
    faults = FaultCounts()
    statements = PackedRecords(parse_entries(file, _lines(file), _parse, faults), _Statement._make)
    return LazyConversations(statements, partial(_conversation, root), faults)


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield every line that is not blank as ``line 3`` and its bytes. Only newlines end lines: JSON may hold U+2028."""
    try:
        refuse_foreign(file)
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return ((f"line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())


def _parse(location: str, line: bytes) -> Iterator[_Statement]:
    entry = json.loads(line.decode().removeprefix(BYTE_ORDER_MARK))
    if not isinstance(entry, dict):
        raise ValueError(f"a line must be an object, got {repr(entry)[:MAX_SHOWN]}")
    folder, name = text_field(entry, "image_link").split("/")[-2:]
    if folder not in FOLDERS:
        raise ValueError(f"image_link must end in one of {sorted(FOLDERS)} and a file name, got {folder}/{name}")
    number = int(location.removeprefix("line "))
    caption = text_field(entry, "caption")
    yield _Statement(number, f"{FOLDERS[folder]}/{name}", caption, _parse_label(entry["label"]))


def _conversation(root: Path, statement: _Statement) -> Conversation:
    key = f"vsr/relation/{statement.line}"
    turn = Turn(PROMPT.format(question=to_question(statement.caption)), ANSWERS[statement.label])
    return Conversation(key, (turn,), image_items(safe_path(root, statement.image, key=key)))


def to_question(statement: str) -> str:
    """Turn a statement into a question, by grammar: ``The cat is beside it.`` -> ``Is the cat beside it?``

    The first standalone "is" or "are" moves to the front; "is" inside a word ("fish", "dish") is not one.
    A statement with another verb, or with several (a relative clause), becomes ``Is it true that ...?``.
    """
    text = statement.strip().rstrip(".").rstrip()
    verbs = list(_VERB.finditer(f" {text} "))
    if len(verbs) == 1 and verbs[0].start() > 0:
        subject, verb, rest = text[: verbs[0].start() - 1], verbs[0].group(1), text[verbs[0].end() - 1 :]
        if rest:
            return f"{verb.capitalize()} {_lower_determiner(subject)} {rest}?"
    return f"Is it true that {_lower_determiner(text)}?"


def _lower_determiner(text: str) -> str:
    """Lower-case a leading determiner; names keep their capital."""
    first, space, rest = text.partition(" ")
    return f"{first.lower() if first in _DETERMINERS else first}{space}{rest}"


def _parse_label(label: object) -> int:
    if label not in (0, 1):
        raise ValueError(f"label must be 0 or 1, got {repr(label)[:MAX_SHOWN]}")
    return int(label == 1)


READER = DatasetReader(FILES, read)
