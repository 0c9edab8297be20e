"""VQAv2: open questions about COCO pictures. https://visualqa.org/download.html"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.json_stream import Place, arrays
from aki_megatron.data.sources.records import PackedRows, Rows, inside, rows_of, text_of
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


class _Row(NamedTuple):
    question_id: int
    image_id: int
    task: str
    question: str
    answer: str


class _Questions:
    """The rows of the questions file, in its order, each with its annotation; what has no partner is kept."""

    def __init__(self, answers: dict[int, tuple[str, str]], subtype: str) -> None:
        self.answers = answers
        self.subtype = subtype
        self.asked: set[int] = set()
        self.unanswered: list[int] = []

    def row(self, place: Place, record: Any) -> Iterator[_Row]:
        """The row of one element of ``questions``; the file's other entries give none."""
        if place.name != "questions":
            self.subtype = str(record) if place.name == "data_subtype" else self.subtype
            return
        question_id = int(record["question_id"])
        answer = self.answers.get(question_id)
        if answer is None:
            self.unanswered.append(question_id)
            return
        self.asked.add(question_id)
        yield _Row(question_id, int(record["image_id"]), answer[0], text_of(record, "question"), answer[1])


def read(root: Path, split: str) -> Sequence[Conversation]:
    """The questions of a split with their most frequent answer.

    Questions and annotations are paired by question_id; the two files must hold the same ids. The task of a
    sample is its ``question_type`` ("how many"), with underscores for spaces.
    """
    questions_file, annotations_file, folder = (root / name for name in FILES[split])
    annotations = arrays(annotations_file, "annotations")
    answers = dict(rows_of(annotations_file, annotations, _answer, id_field="question_id"))
    questions = _Questions(answers, folder.name)
    asked = rows_of(questions_file, arrays(questions_file, "questions"), questions.row, id_field="question_id")
    rows = PackedRows(asked, _Row._make)
    _check_pairs(questions, questions_file, annotations_file)
    return Rows(rows, partial(_conversation, folder, questions.subtype))


def _conversation(folder: Path, subtype: str, row: _Row) -> Conversation:
    key = f"vqav2/{row.task}/{row.question_id}"
    image = inside(folder, f"COCO_{subtype}_{row.image_id:012d}.jpg", key=key)
    return Conversation(key, (Turn(PROMPT.format(question=row.question), row.answer),), image)


def _answer(place: Place, record: Any) -> Iterator[tuple[int, tuple[str, str]]]:
    """question_id -> (task, answer) of one element of ``annotations``."""
    if place.name == "annotations":
        task = "_".join(str(record.get("question_type", "vqa")).replace("/", " ").split()) or "vqa"
        yield int(record["question_id"]), (task, text_of(record, "multiple_choice_answer"))


def _check_pairs(questions: _Questions, questions_file: Path, annotations_file: Path) -> None:
    unanswered, unasked = sorted(questions.unanswered), sorted(set(questions.answers) - questions.asked)
    if unanswered or unasked:
        raise DataError(
            f"{questions_file} and {annotations_file} do not belong together: "
            f"{len(unanswered)} questions without an annotation (question_id {unanswered[:3]}), "
            f"{len(unasked)} annotations without a question (question_id {unasked[:3]})."
        )
