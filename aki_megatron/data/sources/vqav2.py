"""VQAv2: open questions about COCO pictures. https://visualqa.org/download.html"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aki_megatron.data.sources.reading import Rows, naming, read_json
from aki_megatron.flow import Conversation, DataError, Turn

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


def read(root: Path, split: str) -> Sequence[Conversation]:
    """The questions of a split with their most frequent answer.

    Questions and annotations are paired by question_id; the two files must hold the same ids. The task of a
    sample is its ``question_type`` ("how many"), with underscores for spaces.
    """
    questions_name, annotations_name, images = FILES[split]
    questions_file, annotations_file = root / questions_name, root / annotations_name
    with naming(str(questions_file)):
        content = read_json(questions_file)
        questions: list[dict[str, Any]] = content["questions"]
        subtype = str(content.get("data_subtype", images.rpartition("/")[2]))
        asked = {int(question["question_id"]) for question in questions}
    with naming(str(annotations_file)):
        annotations = {int(item["question_id"]): item for item in read_json(annotations_file)["annotations"]}
    _check_pairs(asked, set(annotations), questions_file, annotations_file)
    with naming(f"{questions_file} with {annotations_file}"):
        rows = [_row(question, annotations[int(question["question_id"])]) for question in questions]
    folder = root / images

    def build(row: _Row) -> Conversation:
        turn = Turn(PROMPT.format(question=row.question), row.answer)
        image = folder / f"COCO_{subtype}_{row.image_id:012d}.jpg"
        return Conversation(f"vqav2/{row.task}/{row.question_id}", (turn,), image)

    return Rows(rows, build)


def _row(question: dict[str, Any], annotation: dict[str, Any]) -> _Row:
    task = "_".join(str(annotation.get("question_type", "vqa")).replace("/", " ").split()) or "vqa"
    return _Row(
        int(question["question_id"]),
        int(question["image_id"]),
        task,
        str(question["question"]),
        str(annotation["multiple_choice_answer"]),
    )


def _check_pairs(asked: set[int], answered: set[int], questions_file: Path, annotations_file: Path) -> None:
    unanswered, unasked = sorted(asked - answered), sorted(answered - asked)
    if unanswered or unasked:
        raise DataError(
            f"{questions_file} and {annotations_file} do not belong together: "
            f"{len(unanswered)} questions without an annotation (question_id {unanswered[:3]}), "
            f"{len(unasked)} annotations without a question (question_id {unasked[:3]})."
        )
