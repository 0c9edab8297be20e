"""A-OKVQA: multiple-choice questions about COCO pictures. https://allenai.org/project/a-okvqa"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.json_stream import Place, array
from aki_megatron.data.sources.options import check_choice, lettered
from aki_megatron.data.sources.records import PackedRows, Rows, as_text, inside, rows_of, text_of
from aki_megatron.types import Conversation, Turn

PROMPT = "Answer with the option's letter from the given choices directly. {question}\nOptions:\n{options}\n"

FILES = {
    "train": ("A-OKVQA/aokvqa_v1p0_train.json", "A-OKVQA/train2017"),
    "val": ("A-OKVQA/aokvqa_v1p0_val.json", "A-OKVQA/val2017"),
}


class _Row(NamedTuple):
    question_id: str
    image_id: int
    question: str
    choices: list[str]
    correct: int


def read(root: Path, split: str) -> Sequence[Conversation]:
    """The questions of a split, their options in an order that depends on the question's id alone."""
    file, folder = (root / name for name in FILES[split])
    rows = PackedRows(rows_of(file, array(file), _row, id_field="question_id"), _Row._make)
    return Rows(rows, partial(_conversation, folder))


def _conversation(folder: Path, row: _Row) -> Conversation:
    key = f"aokvqa/choice/{row.question_id}"
    options, letter = lettered(row.choices, row.correct, key)
    turn = Turn(PROMPT.format(question=row.question, options=options), letter)
    return Conversation(key, (turn,), inside(folder, f"{row.image_id:012d}.jpg", key=key))


def _row(place: Place, record: Any) -> Iterator[_Row]:
    choices = [as_text(choice, "choices") for choice in record["choices"]]
    correct = int(record["correct_choice_idx"])
    check_choice(correct, choices, "correct_choice_idx")
    question_id = str(record.get("question_id", place.number))
    yield _Row(question_id, int(record["image_id"]), text_of(record, "question"), choices, correct)
