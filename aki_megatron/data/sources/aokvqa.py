"""A-OKVQA: multiple-choice questions about COCO images. https://allenai.org/project/a-okvqa"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.json_stream import JsonLocation, iter_array
from aki_megatron.data.sources.options import check_choice, letter_options
from aki_megatron.data.sources.records import (
    DatasetReader,
    LazyConversations,
    PackedRecords,
    as_int,
    as_list,
    as_text,
    parse_entries,
    safe_path,
    text_field,
)
from aki_megatron.types import Conversation, Turn, image_items

PROMPT = "Answer with the option's letter from the given choices directly. {question}\nOptions:\n{options}\n"

FILES = {
    "train": ("A-OKVQA/aokvqa_v1p0_train.json", "A-OKVQA/train2017"),
    "val": ("A-OKVQA/aokvqa_v1p0_val.json", "A-OKVQA/val2017"),
}


class _Question(NamedTuple):
    question_id: str
    image_id: int
    question: str
    choices: list[str]
    correct: int


def read(root: Path, split: str) -> LazyConversations[_Question]:
    """Read the questions of a split, their options in an order that depends on the question's id alone."""
    file, folder = (root / name for name in FILES[split])
    faults = FaultCounts()
    questions = parse_entries(file, iter_array(file), _parse, faults, id_field="question_id")
    return LazyConversations(PackedRecords(questions, _Question._make), partial(_conversation, folder), faults)


def _conversation(folder: Path, question: _Question) -> Conversation:
    key = f"aokvqa/choice/{question.question_id}"
    options, letter = letter_options(question.choices, question.correct, key)
    turn = Turn(PROMPT.format(question=question.question, options=options), letter)
    return Conversation(key, (turn,), image_items(safe_path(folder, f"{question.image_id:012d}.jpg", key=key)))


def _parse(location: JsonLocation, entry: Any) -> Iterator[_Question]:
    choices = [as_text(choice, "choices") for choice in as_list(entry["choices"], "choices")]
    correct = as_int(entry["correct_choice_idx"], "correct_choice_idx")
    check_choice(correct, choices, "correct_choice_idx")
    question_id = as_text(entry.get("question_id", location.number), "question_id")
    yield _Question(question_id, as_int(entry["image_id"], "image_id"), text_field(entry, "question"), choices, correct)


READER = DatasetReader(FILES, read)
