"""VQAv2: open questions about COCO images. https://visualqa.org/download.html"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.fault_kinds import FaultCounts
from aki_megatron.data.sources.json_stream import JsonLocation, iter_object_arrays
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
from aki_megatron.types import Conversation, Turn, image_items

PROMPT = "Answer the question using a single word or phrase. {question}"

FILES = {
    split: (
        f"VQA/v2_OpenEnded_mscoco_{subtype}_questions.json",
        f"VQA/v2_mscoco_{subtype}_annotations.json",
        f"VQA/{subtype}",
    )
    for split, subtype in (("train", "train2014"), ("val", "val2014"))
}


_ANOTHER = "another question has this question_id"


class _Question(NamedTuple):
    question_id: int
    image_id: int
    task: str
    question: str
    answer: str


class _Answer(NamedTuple):
    task: str
    answer: str
    image_id: int | None


class _QuestionParser:
    """Parse the questions file in its order, joining each question with its annotation.

    answers    by question_id; None where the annotation cannot be used, which is counted already
    asked      question_id -> hash of its image and question; None for a question that is malformed
    ambiguous  ids of several questions
    """

    def __init__(self, answers: dict[int, _Answer | None], subtype: str) -> None:
        self.answers = answers
        self.subtype = subtype
        self.asked: dict[int, int | None] = {}
        self.ambiguous: set[int] = set()

    def parse(self, location: JsonLocation, entry: Any) -> Iterator[_Question]:
        """Yield the record of one element of ``questions``; the file's other entries give none."""
        if location.name != "questions":
            self.subtype = as_text(entry, "data_subtype") if location.name == "data_subtype" else self.subtype
            return
        question_id = as_int(entry["question_id"], "question_id")
        earlier = self.asked.setdefault(question_id, None)
        image_id, question = as_int(entry["image_id"], "image_id"), text_field(entry, "question")
        self.asked[question_id] = hash((image_id, question))
        if earlier not in (None, self.asked[question_id]):
            self.ambiguous.add(question_id)
            raise ValueError(_ANOTHER)
        if question_id not in self.answers:
            raise ValueError("the question has no annotation")
        if (found := self.answers[question_id]) is None:
            return
        if found.image_id not in (None, image_id):
            raise ValueError(f"the question is about image {image_id}, its annotation about image {found.image_id}")
        yield _Question(question_id, image_id, found.task, question, found.answer)


def read(root: Path, split: str) -> LazyConversations[_Question]:
    """Read the questions of a split with their most frequent answer.

    Questions and annotations are paired by question_id. One without the other is left out, and so is a question with
    two annotations that differ. The task of a sample is its ``question_type`` ("how many"), with underscores for
    spaces.
    """
    questions_file, annotations_file, folder = (root / name for name in FILES[split])
    faults = FaultCounts()
    parser = _QuestionParser(_read_answers(annotations_file, faults), folder.name)
    entries = iter_object_arrays(questions_file, "questions")
    questions = parse_entries(questions_file, entries, parser.parse, faults, id_field="question_id")
    records = PackedRecords(questions, _Question._make)
    if parser.ambiguous:  # which of the questions the annotation answers is not known
        for record in records:
            if record.question_id in parser.ambiguous:
                faults.add(f"{questions_file} (question_id {record.question_id})", _ANOTHER)
        kept = (record for record in records if record.question_id not in parser.ambiguous)
        records = PackedRecords(kept, _Question._make)
    for question_id in parser.answers.keys() - parser.asked.keys():
        faults.add(f"{annotations_file} (question_id {question_id})", f"{questions_file.name} has no such question")
    return LazyConversations(records, partial(_conversation, folder, parser.subtype), faults)


def _read_answers(file: Path, faults: FaultCounts) -> dict[int, _Answer | None]:
    """Return the annotations by question_id; None for one that is malformed, and for two that differ."""
    answers: dict[int, _Answer | None] = {}

    def parse(location: JsonLocation, entry: Any) -> Iterator[tuple[int, _Answer | None]]:
        if location.name == "annotations":
            question_id = as_int(entry["question_id"], "question_id")
            try:
                yield question_id, _parse_answer(entry)
            except MALFORMED as error:
                faults.add(describe_entry(file, location, entry, "question_id"), error_reason(error))
                yield question_id, None

    entries = iter_object_arrays(file, "annotations")
    for question_id, answer in parse_entries(file, entries, parse, faults, id_field="question_id"):
        earlier = answers.setdefault(question_id, answer)
        if earlier is not None and answer is not None and earlier != answer:
            reason = f"two annotations of one question_id differ: {earlier.answer!r} and {answer.answer!r}"
            faults.add(f"{file} (question_id {question_id})", reason)
            answers[question_id] = None
    return answers


def _conversation(folder: Path, subtype: str, question: _Question) -> Conversation:
    key = f"vqav2/{question.task}/{question.question_id}"
    image = safe_path(folder, f"COCO_{subtype}_{question.image_id:012d}.jpg", key=key)
    return Conversation(key, (Turn(PROMPT.format(question=question.question), question.answer),), image_items(image))


def _parse_answer(entry: Any) -> _Answer:
    task = "_".join(as_text(entry.get("question_type", "vqa"), "question_type").replace("/", " ").split()) or "vqa"
    image_id = entry.get("image_id")
    answer = text_field(entry, "multiple_choice_answer")
    return _Answer(task, answer, None if image_id is None else as_int(image_id, "image_id"))


READER = DatasetReader(FILES, read)
