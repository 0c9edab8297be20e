"""The official MMMU parser (MMMU-Benchmark/MMMU, mmmu/utils/eval_utils.py, commit bb0b95a).

Choice questions: the letter named last; where nothing is found, the official code draws one at random. Open questions:
the ends of the sentences that state a result, and all numbers in them.
"""

import re
from collections.abc import Mapping, Sequence

Parsed = list[str | float]

_ENDS = (",", ".", "!", "?", ";", ":", "'")
_MIN_WORDS_FOR_TEXT = 6
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
# the official pattern ends a sentence before a capital letter, in a reply that is lower case by then
_SENTENCE_END = re.compile(r"\.\s(?=[A-Z])|\n")
_TRIVIAL = set(":,.!?;'")
# the official patterns, except that no search begins inside a run of digits: the same matches, in linear time
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"(?:-|(?<!\d))\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"(?:-?\.\d+|(?:-|(?<!\d))(?:\d+\.\d+|\d+\b))(?![eE][+-]?\d+)(?![,\d])"),
)


def parse_choice(reply: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter of the option that the reply names last; None where the official code would draw one.

    Searched in this order: ``(X)``, ``X`` between blanks, the option's text in a reply of more than five words.
    """
    for end in _ENDS:
        reply = reply.strip(end)
    reply = f" {reply} "
    for pattern in ("({})", " {} "):
        if found := _last({letter: reply.rfind(pattern.format(letter)) for letter in choices}):
            return found
    if len(reply.split()) < _MIN_WORDS_FOR_TEXT:
        return None
    lowered = reply.lower()
    return _last({letter: lowered.rfind(text.lower()) for letter, text in choices.items()})


def _last(offsets: Mapping[str, int]) -> str | None:
    """Return the letter with the largest offset, the first one of equals; -1 is not found."""
    found = {letter: offset for letter, offset in offsets.items() if offset >= 0}
    return max(found, key=lambda letter: found[letter]) if found else None


def parse_open(reply: str) -> Parsed:
    """Return the strings and numbers that a reply to an open question states, without duplicates."""
    results = _results(reply)
    texts = [*results, *(number for result in results for number in _extract_numbers(result))]
    return list(dict.fromkeys(value for text in texts for value in normalize(text)))


def _results(reply: str) -> list[str]:
    """Return the shortest end of each sentence after a word that announces a result; the whole reply without any."""
    reply = reply.strip().strip(".").lower()
    sentences = _SENTENCE_END.split(reply)
    found = []
    for number, sentence in enumerate(sentences, start=1):
        indicators = (*_INDICATORS, "=") if number == len(sentences) else _INDICATORS
        ends = [sentence.split(indicator)[-1].strip() for indicator in indicators if indicator in sentence]
        result = ""
        for end in ends:
            if not result or len(end) < len(result):
                result = end
        if result and result not in _TRIVIAL:
            found.append(result)
    return found or [reply]


def _extract_numbers(text: str) -> list[str]:
    return [number for pattern in _NUMBERS for number in pattern.findall(text)]


def normalize(text: str) -> Parsed:
    """Return a number rounded to two decimals, or the text in lower case.

    A single character is returned with a blank before and after it, so that it is not found inside words.
    """
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def open_is_correct(parsed: Parsed, answers: str | Sequence[str]) -> bool:
    """Return whether a parsed string contains an answer, or a parsed number equals one."""
    gold = [value for answer in ([answers] if isinstance(answers, str) else answers) for value in normalize(answer)]
    texts = [value for value in gold if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in gold for value in parsed)
