"""VSR: is a spatial statement about a COCO picture true? https://github.com/cambridgeltl/visual-spatial-reasoning"""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from aki_megatron.data.sources.records import PackedRows, Rows, inside, naming, text_of
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation, Turn

PROMPT = "Answer the question using a single word or phrase. {question} Please answer yes or no."
ANSWERS = ("no", "yes")

FOLDERS = {"train2017": "A-OKVQA/train2017", "val2017": "vsr/val2017"}
"""COCO folder in ``image_link`` -> folder under the data root (VSR shares the training pictures of A-OKVQA)."""

FILES = {
    "train": ("vsr/train-random.jsonl", *FOLDERS.values()),
    "val": ("vsr/dev-random.jsonl", *FOLDERS.values()),
}

_VERB = re.compile(r"\s(is|are)\s")
_DETERMINERS = {"The", "A", "An", "This", "That", "These", "Those", "There", "Some", "One", "Two"}


class _Row(NamedTuple):
    number: int
    line: str


def read(root: Path, split: str) -> Sequence[Conversation]:
    """The statements of a split as yes/no questions. A line is parsed on access; a bad one raises DataError then."""
    file = root / FILES[split][0]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is not readable as lines of JSON: {error}") from error
    rows = (_Row(number, line) for number, line in enumerate(lines, start=1) if line.strip())
    return Rows(PackedRows(rows, _Row._make), partial(_conversation, root, file))


def _conversation(root: Path, file: Path, row: _Row) -> Conversation:
    key = f"vsr/relation/{row.number}"
    with naming(f"{file}, line {row.number}"):
        record = json.loads(row.line)
        folder, name = text_of(record, "image_link").split("/")[-2:]
        if folder not in FOLDERS:
            raise ValueError(f"image_link must end in one of {sorted(FOLDERS)} and a file name, got {folder}/{name}")
        asked = PROMPT.format(question=question(text_of(record, "caption")))
        turn = Turn(asked, ANSWERS[_label(record["label"])])
        return Conversation(key, (turn,), inside(root, f"{FOLDERS[folder]}/{name}", key=key))


def question(statement: str) -> str:
    """The statement as a question, by grammar: ``The cat is beside the dog.`` -> ``Is the cat beside the dog?``

    The first standalone "is" or "are" moves to the front; "is" inside a word ("fish", "dish") is not one.
    A statement with another verb, or with several (a relative clause), becomes ``Is it true that ...?``.
    """
    words = statement.strip().rstrip(".").rstrip()
    verbs = list(_VERB.finditer(f" {words} "))
    if len(verbs) == 1 and verbs[0].start() > 0:
        subject, verb, rest = words[: verbs[0].start() - 1], verbs[0].group(1), words[verbs[0].end() - 1 :]
        if rest:
            return f"{verb.capitalize()} {_lower_first(subject)} {rest}?"
    return f"Is it true that {_lower_first(words)}?"


def _lower_first(words: str) -> str:
    """Lower-case a leading determiner; names keep their capital."""
    first, space, rest = words.partition(" ")
    return f"{first.lower() if first in _DETERMINERS else first}{space}{rest}"


def _label(label: object) -> int:
    if label not in (0, 1):
        raise ValueError(f"label must be 0 or 1, got {label!r}")
    return int(label == 1)
