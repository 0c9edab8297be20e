"""A-OKVQA (https://github.com/allenai/aokvqa): multiple-choice questions."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from aki_megatron.synthetic.files import write_json
from aki_megatron.synthetic.questions import MultipleChoice

_NUM_DIRECT_ANSWERS = 10
_ID_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_LENGTH = 22


def write(path: Path, split: str, asked: Sequence[tuple[int, Sequence[MultipleChoice]]]) -> None:
    """Write the file of ``split`` (train or val) from (image id, questions)."""
    entries = []
    for image_id, questions in asked:
        for number, question in enumerate(questions):
            answer = question.options[question.correct]
            entries.append(
                {
                    "split": split,
                    "image_id": image_id,
                    "question_id": _question_id(f"{split}/{image_id}/{number}"),
                    "question": question.text,
                    "choices": list(question.options),
                    "correct_choice_idx": question.correct,
                    "direct_answers": [answer] * _NUM_DIRECT_ANSWERS,
                    "difficult_direct_answer": False,
                    "rationales": [f"The object there is the {answer}."] * 3,
                }
            )
    write_json(path, entries)


def _question_id(text: str) -> str:
    """Hash ``text`` into 22 characters, as A-OKVQA's question ids."""
    number, digits = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big"), []
    for _ in range(_ID_LENGTH):
        number, digit = divmod(number, len(_ID_ALPHABET))
        digits.append(_ID_ALPHABET[digit])
    return "".join(digits)
