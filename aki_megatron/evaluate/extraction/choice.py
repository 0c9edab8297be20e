"""Read an option letter out of a reply, as VLMEvalKit does before it would ask a language model."""

import re
from collections.abc import Mapping

from aki_megatron.evaluate.extraction.rules import Rules

NONE_OF_THEM = "Z"
"""The rule decides that the reply names none of the options."""

_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS = 4


def extract_choice(reply: str, choices: Mapping[str, str], rules: Rules = Rules.MAR2025) -> str | None:
    """Return the letter of the option that the reply names, "Z" for none of them, None where the rule is undecided.

    choices  letter -> text. A single letter among the words counts first, then a single option text in the reply.
    """
    return _extract_letter(reply, choices, rules) or _extract_text(reply, choices, rules)


def _extract_letter(reply: str, choices: Mapping[str, str], rules: Rules) -> str | None:
    if _API_FAILURE in reply:
        return None
    if any(refusal in reply for refusal in _REFUSALS):
        return NONE_OF_THEM
    words = reply.translate(_SEPARATORS).split()
    named = [letter for letter in choices if letter in words]
    if not named and NONE_OF_THEM in words:
        return NONE_OF_THEM
    if rules == Rules.MAR2025:
        return named[0] if len(named) == 1 else None
    if len(named) == 1 and words.index(named[0]) >= len(words) - _LAST_WORDS:
        return named[0]
    found = _ANSWER_IS.search(reply)
    return found[1].upper() if found and found[1].upper() in choices else None


def _extract_text(reply: str, choices: Mapping[str, str], rules: Rules) -> str | None:
    lowered = reply.lower()
    if rules == Rules.HEAD2026 and len(lowered) > 2 * sum(map(len, choices.values())):
        return None
    named = [letter for letter, text in choices.items() if text.lower() in lowered]
    return named[0] if len(named) == 1 else None
