"""OCR-VQA: questions about book covers. https://ocr-vqa.github.io"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from aki_megatron.data.sources.json_stream import Place, members
from aki_megatron.data.sources.records import PackedRows, Rows, as_text, inside, rows_of, text_of
from aki_megatron.data.sources.vqav2 import PROMPT
from aki_megatron.types import Conversation, Turn

FILES = dict.fromkeys(("train", "val"), ("OCRVQA/dataset.json", "OCRVQA/images"))

SPLIT = {"train": 1, "val": 2}
"""The numbers in ``split``; 3 is the test split."""


class _Row(NamedTuple):
    cover: str
    number: int
    extension: str
    question: str
    answer: str


def read(root: Path, split: str) -> Sequence[Conversation]:
    """The questions of a split, each a sample of its own. A picture is named by its key and its address's ending."""
    file, folder = (root / name for name in FILES[split])
    rows = rows_of(file, members(file), partial(_rows, SPLIT[split]))
    return Rows(PackedRows(rows, _Row._make), partial(_conversation, folder))


def _conversation(folder: Path, row: _Row) -> Conversation:
    key = f"ocrvqa/cover/{row.cover}.{row.number}"
    image = inside(folder, row.cover + row.extension, key=key)
    return Conversation(key, (Turn(PROMPT.format(question=row.question), row.answer),), image)


def _rows(split: int, place: Place, record: Any) -> Iterator[_Row]:
    if int(record["split"]) != split:
        return
    questions, answers = record["questions"], record["answers"]
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        raise ValueError("questions and answers must be two lists of one length")
    extension = PurePosixPath(text_of(record, "imageURL")).suffix
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        yield _Row(place.name, number, extension, as_text(question, "questions"), as_text(answer, "answers"))
