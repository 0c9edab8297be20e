"""Read Yes or No out of a reply, as VLMEvalKit does for MME and POPE."""

import re

from aki_megatron.evaluate.extraction.rules import Rules

UNKNOWN = "Unknown"
"""The rule decides neither Yes nor No."""

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = {
    # the kit's lookbehind was misspelt until 2025: stops after a digit were removed too
    Rules.MAR2025: re.compile(r"\.(?!\d)"),
    Rules.HEAD2026: re.compile(r"(?<!\d)\.(?!\d)"),
}
_MAX_FULL_STOPS = 32
"""The kit passes a flag of value 32 where the number of replacements belongs."""


def strip_punctuation(text: str, rules: Rules) -> str:
    """Remove punctuation as the kit's adaptation of the VQA evaluation does.

    A sign that touches a blank is deleted, another one becomes a blank; all are deleted where the text holds a digit,
    a comma and a digit. Only the first 32 full stops are removed.
    """
    has_number_with_comma = _COMMA_IN_NUMBER.search(text) is not None
    stripped = text
    for sign in _SIGNS:
        deleted = has_number_with_comma or f"{sign} " in text or f" {sign}" in text
        stripped = stripped.replace(sign, "" if deleted else " ")
    return _FULL_STOP[rules].sub("", stripped, count=_MAX_FULL_STOPS)


def extract_yes_no(reply: str, rules: Rules = Rules.MAR2025) -> str:
    """Return "Yes", "No", or "Unknown" where the reply's words hold neither or both."""
    words = set(strip_punctuation(reply.lower(), rules).split())
    has_yes, has_no = "yes" in words, "no" in words
    if has_yes == has_no:
        return UNKNOWN
    return "Yes" if has_yes else "No"
