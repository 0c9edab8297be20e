"""VQAv2: open questions about COCO images. https://visualqa.org/download.html"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.json_stream import JsonLocation, iter_object_arrays
from aki_megatron.data.sources.records import (
    DatasetReader,
    LazyConversations,
    PackedRecords,
    check_no_id_twice,
    parse_entries,
    safe_path,
    text_field,
    unique_by_id,
)
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation, Turn

PROMPT = "Answer the question using a single word or phrase. {question}"

FILES = {
    split: (
        f"VQA/v2_OpenEnded_mscoco_{subtype}_questions.json",
        f"VQA/v2_mscoco_{subtype}_annotations.json",
        f"VQA/{subtype}",
    )
    for split, subtype in (("train", "train2014"), ("val", "val2014"))
}


class _Question(NamedTuple):
    question_id: int
    image_id: int
    task: str
    question: str
    answer: str


class _QuestionParser:
    """Parse the questions file in its order, joining each question with its annotation; keep what has no partner."""

    def __init__(self, answers: dict[int, tuple[str, str]], subtype: str) -> None:
        self.answers = answers
        self.subtype = subtype
        self.answered: set[int] = set()
        self.repeated: list[int] = []
        self.unanswered: list[int] = []

    def parse(self, location: JsonLocation, entry: Any) -> Iterator[_Question]:
        """Yield the record of one element of ``questions``; the file's other entries give none."""
        if location.name != "questions":
            self.subtype = str(entry) if location.name == "data_subtype" else self.subtype
            return
        question_id = int(entry["question_id"])
        answer = self.answers.get(question_id)
        if answer is None:
            self.unanswered.append(question_id)
            return
        if question_id in self.answered:
            self.repeated.append(question_id)
        self.answered.add(question_id)
        yield _Question(question_id, int(entry["image_id"]), answer[0], text_field(entry, "question"), answer[1])


def read(root: Path, split: str) -> Sequence[Conversation]:
    """Read the questions of a split with their most frequent answer.

    Questions and annotations are paired by question_id; the two files must hold the same ids, each once. The task of a
    sample is its ``question_type`` ("how many"), with underscores for spaces.
    """
    questions_file, annotations_file, folder = (root / name for name in FILES[split])
    annotations = iter_object_arrays(annotations_file, "annotations")
    parsed = parse_entries(annotations_file, annotations, _parse_answer, id_field="question_id")
    answers = unique_by_id(annotations_file, parsed, "question_id")
    parser = _QuestionParser(answers, folder.name)
    entries = iter_object_arrays(questions_file, "questions")
    questions = parse_entries(questions_file, entries, parser.parse, id_field="question_id")
    records = PackedRecords(questions, _Question._make)
    check_no_id_twice(questions_file, parser.repeated, "question_id")
    _check_pairs(parser, questions_file, annotations_file)
    return LazyConversations(records, partial(_conversation, folder, parser.subtype))


def _conversation(folder: Path, subtype: str, question: _Question) -> Conversation:
    key = f"vqav2/{question.task}/{question.question_id}"
    image = safe_path(folder, f"COCO_{subtype}_{question.image_id:012d}.jpg", key=key)
    return Conversation(key, (Turn(PROMPT.format(question=question.question), question.answer),), image)


def _parse_answer(location: JsonLocation, entry: Any) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield (question_id, (task, answer)) of one element of ``annotations``."""
    if location.name == "annotations":
        task = "_".join(str(entry.get("question_type", "vqa")).replace("/", " ").split()) or "vqa"
        yield int(entry["question_id"]), (task, text_field(entry, "multiple_choice_answer"))


def _check_pairs(parser: _QuestionParser, questions_file: Path, annotations_file: Path) -> None:
    unanswered, unasked = sorted(parser.unanswered), sorted(set(parser.answers) - parser.answered)
    if unanswered or unasked:
        raise DataError(
            f"{questions_file} and {annotations_file} do not belong together: "
            f"{len(unanswered)} questions without an annotation (question_id {unanswered[:3]}), "
            f"{len(unasked)} annotations without a question (question_id {unasked[:3]})."
        )


READER = DatasetReader(FILES, read)
