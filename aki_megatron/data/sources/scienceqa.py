"""ScienceQA: multiple-choice questions of school science, half of them with a picture. https://scienceqa.github.io"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.json_stream import Place, members
from aki_megatron.data.sources.options import check_choice, lettered
from aki_megatron.data.sources.records import PackedRows, Rows, as_text, inside, rows_of, text_of
from aki_megatron.types import Conversation, Turn

PROMPT = (
    "Answer with the option's letter from the given choices directly. "
    "{question}\nContext: {context}\nOptions:\n{options}\n"
)
NO_HINT = "N/A"

FILES = {split: ("ScienceQA/problems.json", f"ScienceQA/images/{split}") for split in ("train", "val")}


class _Row(NamedTuple):
    problem: str
    image: str
    question: str
    context: str
    choices: list[str]
    correct: int


def read(root: Path, split: str) -> Sequence[Conversation]:
    """The problems of a split; one without a picture is text only. Tasks: ``image`` and ``text``.

    The options stand in an order that depends on the problem's number alone.
    """
    file, folder = (root / name for name in FILES[split])
    rows = rows_of(file, members(file), partial(_rows, split))
    return Rows(PackedRows(rows, _Row._make), partial(_conversation, folder))


def _conversation(folder: Path, row: _Row) -> Conversation:
    key = f"scienceqa/{'image' if row.image else 'text'}/{row.problem}"
    options, letter = lettered(row.choices, row.correct, key)
    prompt = PROMPT.format(question=row.question, context=row.context, options=options)
    image = inside(folder, f"{row.problem}/{row.image}", key=key) if row.image else None
    return Conversation(key, (Turn(prompt, letter),), image)


def _rows(split: str, place: Place, record: Any) -> Iterator[_Row]:
    if record["split"] != split:
        return
    choices = [as_text(choice, "choices") for choice in record["choices"]]
    correct = int(record["answer"])
    check_choice(correct, choices, "answer")
    context = as_text(record.get("hint") or NO_HINT, "hint")
    image = as_text(record["image"] or "", "image")  # null where there is none
    yield _Row(place.name, image, text_of(record, "question"), context, choices, correct)
