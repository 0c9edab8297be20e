"""A-OKVQA: multiple-choice questions about COCO pictures. https://allenai.org/project/a-okvqa"""

from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NamedTuple

from aki_megatron.data.sources.reading import Rows, naming, read_json, shuffled
from aki_megatron.flow import Conversation, Turn

PROMPT = "Answer with the option's letter from the given choices directly. {question}\nOptions:\n{options}\n"

FILES = {
    "train": ("A-OKVQA/aokvqa_v1p0_train.json", "A-OKVQA/train2017"),
    "val": ("A-OKVQA/aokvqa_v1p0_val.json", "A-OKVQA/val2017"),
}


class _Row(NamedTuple):
    question_id: str
    image_id: int
    question: str
    choices: tuple[str, ...]
    correct: int


def read(root: Path, split: str) -> Sequence[Conversation]:
    """The questions of a split, their options in an order that depends on the question's id alone."""
    name, images = FILES[split]
    with naming(str(root / name)):
        rows = [_row(number, record) for number, record in enumerate(read_json(root / name))]
    folder = root / images

    def build(row: _Row) -> Conversation:
        key = f"aokvqa/choice/{row.question_id}"
        options, letter = lettered(row.choices, row.correct, key)
        turn = Turn(PROMPT.format(question=row.question, options=options), letter)
        return Conversation(key, (turn,), folder / f"{row.image_id:012d}.jpg")

    return Rows(rows, build)


def lettered(choices: Sequence[str], correct: int, key: str) -> tuple[str, str]:
    """Shuffled option lines ``A. text`` and the letter of the correct one; a pure function of its arguments."""
    order = shuffled(len(choices), key)
    lines = [f"{letter}. {choices[index]}" for letter, index in zip(ascii_uppercase, order, strict=False)]
    return "\n".join(lines), ascii_uppercase[order.index(correct)]


def _row(number: int, record: dict[str, Any]) -> _Row:
    choices = tuple(str(choice) for choice in record["choices"])
    correct = int(record["correct_choice_idx"])
    question_id = str(record.get("question_id", number))
    if not 0 <= correct < len(choices) <= len(ascii_uppercase):
        raise ValueError(f"question_id {question_id}: correct_choice_idx={correct} of {len(choices)} choices")
    return _Row(question_id, int(record["image_id"]), str(record["question"]), choices, correct)
