"""ScienceQA: multiple-choice questions of school science, half of them with an image. https://scienceqa.github.io"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.json_stream import JsonLocation, iter_object
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

PROMPT = (
    "Answer with the option's letter from the given choices directly. "
    "{question}\nContext: {context}\nOptions:\n{options}\n"
)
NO_HINT = "N/A"

FILES = {split: ("ScienceQA/problems.json", f"ScienceQA/images/{split}") for split in ("train", "val")}


class _Problem(NamedTuple):
    number: str
    image: str
    question: str
    context: str
    choices: list[str]
    correct: int


def find_files(root: Path, split: str) -> tuple[str, ...]:
    """Return the files of a root; the folder of images is left out where it is absent and no problem has an image."""
    problems, folder = FILES[split]
    if (root / folder).exists() or not (root / problems).is_file():
        return FILES[split]
    entries = (entry for _, entry in iter_object(root / problems) if isinstance(entry, dict))
    has_images = any(entry.get("image") for entry in entries if entry.get("split") == split)
    return FILES[split] if has_images else (problems,)


def read(root: Path, split: str) -> LazyConversations[_Problem]:
    """Read the problems of a split; one without an image is text only. Tasks: ``image`` and ``text``.

    The options are in an order that depends on the problem's number alone.
    """
    file, folder = (root / name for name in FILES[split])
    faults = FaultCounts()
    problems = parse_entries(file, iter_object(file), partial(_parse, split), faults)
    return LazyConversations(PackedRecords(problems, _Problem._make), partial(_conversation, folder), faults)


def _conversation(folder: Path, problem: _Problem) -> Conversation:
    key = f"scienceqa/{'image' if problem.image else 'text'}/{problem.number}"
    options, letter = letter_options(problem.choices, problem.correct, key)
    prompt = PROMPT.format(question=problem.question, context=problem.context, options=options)
    image = safe_path(folder, f"{problem.number}/{problem.image}", key=key) if problem.image else None
    return Conversation(key, (Turn(prompt, letter),), image_items(image))


def _parse(split: str, location: JsonLocation, entry: Any) -> Iterator[_Problem]:
    if entry["split"] != split:
        return
    choices = [as_text(choice, "choices") for choice in as_list(entry["choices"], "choices")]
    correct = as_int(entry["answer"], "answer")
    check_choice(correct, choices, "answer")
    context = as_text(entry.get("hint") or NO_HINT, "hint")
    image = as_text(entry["image"] or "", "image")  # null where there is none
    number = as_text(location.name, "the name of an entry")
    yield _Problem(number, image, text_field(entry, "question"), context, choices, correct)


READER = DatasetReader(FILES, read, find_files=find_files)
