"""OCR-VQA: questions about book covers. https://ocr-vqa.github.io"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from aki_megatron.data.sources.json_stream import JsonLocation, iter_object
from aki_megatron.data.sources.records import (
    DatasetReader,
    LazyConversations,
    PackedRecords,
    as_text,
    parse_entries,
    safe_path,
    text_field,
)
from aki_megatron.data.sources.vqav2 import PROMPT
from aki_megatron.types import Conversation, Turn

FILES = dict.fromkeys(("train", "val"), ("OCRVQA/dataset.json", "OCRVQA/images"))

SPLIT_NUMBERS = {"train": 1, "val": 2}
"""Values of the field ``split``; 3 is the test split."""


class _Question(NamedTuple):
    cover: str
    number: int
    extension: str
    question: str
    answer: str


def read(root: Path, split: str) -> Sequence[Conversation]:
    """Read the questions of a split, each a sample of its own. An image is named by its key and its URL's suffix."""
    file, folder = (root / name for name in FILES[split])
    questions = parse_entries(file, iter_object(file), partial(_parse, SPLIT_NUMBERS[split]))
    return LazyConversations(PackedRecords(questions, _Question._make), partial(_conversation, folder))


def _conversation(folder: Path, question: _Question) -> Conversation:
    key = f"ocrvqa/cover/{question.cover}.{question.number}"
    image = safe_path(folder, question.cover + question.extension, key=key)
    return Conversation(key, (Turn(PROMPT.format(question=question.question), question.answer),), image)


def _parse(split_number: int, location: JsonLocation, entry: Any) -> Iterator[_Question]:
    if int(entry["split"]) != split_number:
        return
    questions, answers = entry["questions"], entry["answers"]
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        raise ValueError("questions and answers must be two lists of one length")
    extension = PurePosixPath(text_field(entry, "imageURL")).suffix
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        yield _Question(location.name, number, extension, as_text(question, "questions"), as_text(answer, "answers"))


READER = DatasetReader(FILES, read)
