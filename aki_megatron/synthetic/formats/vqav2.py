"""VQAv2 (https://visualqa.org/download.html): a question file and an annotation file per subset."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aki_megatron.synthetic.files import COCO_INFO, COCO_LICENSE, write_json
from aki_megatron.synthetic.questions import Question

NUM_ANNOTATORS = 10
"""Answers per question. The scenes are unambiguous, so all ten agree."""


def write(folder: Path, subset: str, asked: Sequence[tuple[int, Sequence[Question]]]) -> None:
    """Write both files of ``subset``, train2014 or val2014, from (image id, questions); question_type is the task."""
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, of_image in asked:
        for number, question in enumerate(of_image):
            question_id = image_id * 1000 + number  # as in VQAv2
            questions.append({"image_id": image_id, "question": question.text, "question_id": question_id})
            answers = [
                {"answer": question.answer, "answer_confidence": "yes", "answer_id": annotator}
                for annotator in range(1, NUM_ANNOTATORS + 1)
            ]
            annotations.append(
                {
                    "question_type": question.task,
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                    "image_id": image_id,
                    "answer_type": question.answer_type,
                    "question_id": question_id,
                }
            )
    header = {"info": COCO_INFO, "license": COCO_LICENSE, "data_type": "mscoco", "data_subtype": subset}
    write_json(
        folder / f"v2_OpenEnded_mscoco_{subset}_questions.json",
        {**header, "task_type": "Open-Ended", "questions": questions},
    )
    write_json(folder / f"v2_mscoco_{subset}_annotations.json", {**header, "annotations": annotations})
