"""An offline judge that compares words: to try the pipeline without a language model, never the papers' metric."""

import re

from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion
from aki_megatron.evaluate.judges.judge import JudgeError, JudgeRequest

_WORD = re.compile(r"\w+")
_LIST = re.compile(r"\[[^\[\]]*\]")
_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_LETTER = re.compile(r"\(([A-Z])\)|\b([A-Z])\b")
REFERENCE_GRADE = 8
"""What the reference answer of LLaVA-Bench gets."""


class HeuristicJudge:
    """Grades by words in common; extracts by rule."""

    name = "offline heuristic (word overlap)"
    is_heuristic = True

    def ask(self, request: JudgeRequest) -> str:
        """Return a reply of the form that the benchmark's parser reads."""
        question, reply = request.prediction.question, request.prediction.reply
        if question.benchmark == "MM-Vet":
            return f"{grade_parts(question.answer, reply):.1f}"
        if question.benchmark == "LLaVA-Bench":
            return f"{REFERENCE_GRADE} {1 + round(9 * word_f1(question.answer, reply))}"
        if question.benchmark == "MathVista":
            return extract_value(question, reply)
        raise JudgeError(f"the offline heuristic has no rule for {question.benchmark}")


def words(text: str) -> set[str]:
    """Return the words of a text in lower case."""
    return set(_WORD.findall(text.lower()))


def word_f1(reference: str, reply: str) -> float:
    """Return F1 of the sets of words, from 0 to 1."""
    expected, found = words(reference), words(reply)
    common = len(expected & found)
    return 2 * common / (len(expected) + len(found)) if common else 0.0


def grade_parts(reference: str, reply: str) -> float:
    """Return the largest fraction of the <AND> parts of an <OR> alternative whose words are all in the reply."""
    found = words(reply)
    best = 0.0
    for alternative in reference.split("<OR>"):
        parts = [words(part) for part in alternative.split("<AND>")]
        best = max(best, sum(bool(part) and part <= found for part in parts) / len(parts))
    return best


def extract_value(question: BenchmarkQuestion, reply: str) -> str:
    """Return the last list, number or option letter of a reply, by what the question asks for; "" without any."""
    if question.details.get("question_type") == "multi_choice":
        found = ["".join(groups) for groups in _LETTER.findall(reply)]
    elif question.details.get("answer_type") == "list":
        found = _LIST.findall(reply)
    else:
        found = [number.replace(",", "") for number in _NUMBER.findall(reply)]
    return found[-1] if found else ""
