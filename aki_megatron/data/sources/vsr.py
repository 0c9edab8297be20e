"""VSR: is a spatial statement about a COCO image true? https://github.com/cambridgeltl/visual-spatial-reasoning"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from aki_megatron.data.sources.records import (
    DatasetReader,
    LazyConversations,
    PackedRecords,
    data_errors,
    safe_path,
    text_field,
)
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation, Turn

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


class _Line(NamedTuple):
    number: int
    text: str


def read(root: Path, split: str) -> Sequence[Conversation]:
    """Read the statements of a split as yes/no questions. A bad line raises DataError on access, not now."""
    file = root / FILES[split][0]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not readable as lines of JSON: {error}") from error
    records = (_Line(number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return LazyConversations(PackedRecords(records, _Line._make), partial(_conversation, root, file))


def _conversation(root: Path, file: Path, line: _Line) -> Conversation:
    key = f"vsr/relation/{line.number}"
    with data_errors(f"{file}, line {line.number}"):
        entry = json.loads(line.text)
        folder, name = text_field(entry, "image_link").split("/")[-2:]
        if folder not in FOLDERS:
            raise ValueError(f"image_link must end in one of {sorted(FOLDERS)} and a file name, got {folder}/{name}")
        prompt = PROMPT.format(question=to_question(text_field(entry, "caption")))
        turn = Turn(prompt, ANSWERS[_parse_label(entry["label"])])
        return Conversation(key, (turn,), safe_path(root, f"{FOLDERS[folder]}/{name}", key=key))


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
        raise ValueError(f"label must be 0 or 1, got {label!r}")
    return int(label == 1)


READER = DatasetReader(FILES, read)
