"""OCR-VQA: questions about book covers. https://ocr-vqa.github.io"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.json_stream import JsonLocation, iter_object
from aki_megatron.data.sources.records import (
    MALFORMED,
    DatasetReader,
    LazyConversations,
    PackedRecords,
    as_int,
    as_text,
    describe_entry,
    error_reason,
    parse_entries,
    safe_path,
    text_field,
)
from aki_megatron.data.sources.vqav2 import PROMPT
from aki_megatron.types import Conversation, Turn, image_items

FILES = dict.fromkeys(("train", "val"), ("OCRVQA/dataset.json", "OCRVQA/images"))

SUFFIXES = (".jpg", ".png", ".gif", ".jpeg", ".webp")
"""Of saved covers: many downloaders name all of them .jpg, or by their content."""

SPLIT_NUMBERS = {"train": 1, "val": 2}
"""Values of the field ``split``; 3 is the test split."""


class _Question(NamedTuple):
    cover: str
    number: int
    extension: str
    question: str
    answer: str


def read(root: Path, split: str) -> LazyConversations[_Question]:
    """Read the questions of a split, each a sample of its own. An image is named by its key and its URL's
    suffix, or by another suffix of SUFFIXES."""
    file, folder = (root / name for name in FILES[split])
    faults = FaultCounts()
    questions = parse_entries(file, iter_object(file), partial(_parse, file, faults, SPLIT_NUMBERS[split]), faults)
    return LazyConversations(PackedRecords(questions, _Question._make), partial(_conversation, folder), faults)


def _conversation(folder: Path, question: _Question) -> Conversation:
    key = f"ocrvqa/cover/{question.cover}.{question.number}"
    image = _find_image(safe_path(folder, question.cover + question.extension, key=key))
    return Conversation(key, (Turn(PROMPT.format(question=question.question), question.answer),), image_items(image))


def _find_image(image: Path) -> Path:
    """Return the image, or the one of another suffix where only that was saved; the former if there is none."""
    try:
        if image.exists():
            return image
        return next((other for suffix in SUFFIXES if (other := image.with_suffix(suffix)).exists()), image)
    except (OSError, ValueError):  # a name that no file can have
        return image


def _parse(
    file: Path, faults: FaultCounts, split_number: int, location: JsonLocation, entry: Any
) -> Iterator[_Question]:
    """Yield the questions of a cover; one that is malformed is left out without the others."""
    if as_int(entry["split"], "split") != split_number:
        return
    questions, answers = entry["questions"], entry["answers"]
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        raise ValueError("questions and answers must be two lists of one length")
    cover = as_text(location.name, "the name of an entry")
    extension = PurePosixPath(text_field(entry, "imageURL")).suffix
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        try:
            yield _Question(cover, number, extension, as_text(question, "questions"), as_text(answer, "answers"))
        except MALFORMED as error:
            faults.add(f"{describe_entry(file, location, entry)}, questions[{number}]", error_reason(error))


READER = DatasetReader(FILES, read)
