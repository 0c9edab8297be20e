"""GQA: questions generated from scene graphs (balanced). https://cs.stanford.edu/people/dorarad/gqa/download.html"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.json_stream import JsonLocation, iter_object
from aki_megatron.data.sources.records import (
    DatasetReader,
    LazyConversations,
    PackedRecords,
    parse_entries,
    safe_path,
    text_field,
)
from aki_megatron.data.sources.vqav2 import PROMPT
from aki_megatron.types import Conversation, Turn

FILES = {split: (f"GQA/{split}_balanced_questions.json", "GQA/images") for split in ("train", "val")}


class _Question(NamedTuple):
    question_id: str
    image_id: str
    task: str
    question: str
    answer: str


def read(root: Path, split: str) -> Sequence[Conversation]:
    """Read the balanced questions of a split with their short answer (``answer``, not ``fullAnswer``).

    The task of a sample is its structural type (verify, query, choose, logical, compare), where it has one.
    """
    file, folder = (root / name for name in FILES[split])
    questions = PackedRecords(parse_entries(file, iter_object(file), _parse), _Question._make)
    return LazyConversations(questions, partial(_conversation, folder))


def _conversation(folder: Path, question: _Question) -> Conversation:
    key = f"gqa/{question.task}/{question.question_id}"
    image = safe_path(folder, f"{question.image_id}.jpg", key=key)
    return Conversation(key, (Turn(PROMPT.format(question=question.question), question.answer),), image)


def _parse(location: JsonLocation, entry: Any) -> Iterator[_Question]:
    types = entry.get("types") or {}
    task = str(types.get("structural") or "vqa").replace("/", "_")
    image_id = text_field(entry, "imageId")
    yield _Question(location.name, image_id, task, text_field(entry, "question"), text_field(entry, "answer"))


READER = DatasetReader(FILES, read)
