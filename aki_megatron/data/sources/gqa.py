"""GQA: questions made from scene graphs (balanced). https://cs.stanford.edu/people/dorarad/gqa/download.html"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.json_stream import Place, members
from aki_megatron.data.sources.records import PackedRows, Rows, inside, rows_of, text_of
from aki_megatron.data.sources.vqav2 import PROMPT
from aki_megatron.types import Conversation, Turn

FILES = {split: (f"GQA/{split}_balanced_questions.json", "GQA/images") for split in ("train", "val")}


class _Row(NamedTuple):
    question_id: str
    image_id: str
    task: str
    question: str
    answer: str


def read(root: Path, split: str) -> Sequence[Conversation]:
    """The balanced questions of a split with their short answer (``answer``, not ``fullAnswer``).

    The task of a sample is its structural type (verify, query, choose, logical, compare), where it has one.
    """
    file, folder = (root / name for name in FILES[split])
    return Rows(PackedRows(rows_of(file, members(file), _row), _Row._make), partial(_conversation, folder))


def _conversation(folder: Path, row: _Row) -> Conversation:
    key = f"gqa/{row.task}/{row.question_id}"
    image = inside(folder, f"{row.image_id}.jpg", key=key)
    return Conversation(key, (Turn(PROMPT.format(question=row.question), row.answer),), image)


def _row(place: Place, record: Any) -> Iterator[_Row]:
    types = record.get("types") or {}
    task = str(types.get("structural") or "vqa").replace("/", "_")
    image_id = text_of(record, "imageId")
    yield _Row(place.name, image_id, task, text_of(record, "question"), text_of(record, "answer"))
