"""GQA: questions generated from scene graphs (balanced). https://cs.stanford.edu/people/dorarad/gqa/download.html"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
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
from aki_megatron.types import Conversation, Turn, image_items

FILES = {split: (f"GQA/{split}_balanced_questions.json", "GQA/images") for split in ("train", "val")}


class _Question(NamedTuple):
    question_id: str
    image_id: str
    task: str
    question: str
    answer: str


def read(root: Path, split: str) -> LazyConversations[_Question]:
    """Read the balanced questions of a split with their short answer (``answer``, not ``fullAnswer``).

    The task of a sample is its structural type (verify, query, choose, logical, compare), where it has one.
    """
    file, folder = (root / name for name in FILES[split])
    faults = FaultCounts()
    questions = PackedRecords(parse_entries(file, iter_object(file), _parse, faults), _Question._make)
    return LazyConversations(questions, partial(_conversation, folder), faults)


def _conversation(folder: Path, question: _Question) -> Conversation:
    key = f"gqa/{question.task}/{question.question_id}"
    image = safe_path(folder, f"{question.image_id}.jpg", key=key)
    return Conversation(key, (Turn(PROMPT.format(question=question.question), question.answer),), image_items(image))


def _parse(location: JsonLocation, entry: Any) -> Iterator[_Question]:
    types = entry.get("types") or {}
    task = as_text(types.get("structural") or "vqa", "structural").replace("/", "_")
    image_id = text_field(entry, "imageId")
    question_id = as_text(location.name, "the name of an entry")
    yield _Question(question_id, image_id, task, text_field(entry, "question"), text_field(entry, "answer"))


READER = DatasetReader(FILES, read)
