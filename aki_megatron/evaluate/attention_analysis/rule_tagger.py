"""A tagger of closed classes and endings, without a dictionary of open classes: coarse, but the same everywhere."""

import re
from collections.abc import Sequence

CLOSED = {
    "DT": "a an the this that these those each every some any no another either neither both all",
    "IN": "of in on at by for with from about into over under above below behind beside between among through during"
    " before after near inside outside against along across around upon within without beneath underneath than as if"
    " because while since until like",
    "TO": "to",
    "CC": "and or but nor yet",
    "PRP": "i you he she it we they me him her us them itself himself herself themselves",
    "PRP$": "my your his its our their",
    "WP": "who what whom",
    "WDT": "which",
    "WRB": "where when how why",
    "MD": "can could may might must shall should will would 'll 'd",
    "EX": "there",
    "VBZ": "is does has",
    "VBP": "are do have am 're 'm 've",
    "VBD": "was were did had",
    "VB": "be answer select choose describe name tell give show look wear hold use make see",
    "VBN": "been compared shown done seen made held worn",
    "RB": "not n't very too also only just now then here never always often again please",
    "UH": "yes oh",
    "POS": "'s",
    "JJ": "red green blue yellow black white brown grey gray orange pink purple big small large little long short tall"
    " old new young open other same different many much more most few left right top bottom front main single",
    "CD": "one two three four five six seven eight nine ten",
    "RP": "up down off out away",
}
"""Tag -> words in lower case; verbs and adjectives are those that questions about pictures use most."""

_OF_WORD = {word: tag for tag, words in CLOSED.items() for word in words.split()}

ENDINGS = (
    ("ing", "VBG"), ("ed", "VBD"), ("ly", "RB"), ("ness", "NN"), ("ment", "NN"), ("tion", "NN"), ("ful", "JJ"),
    ("ous", "JJ"), ("ive", "JJ"), ("able", "JJ"), ("ical", "JJ"), ("est", "JJS"), ("ss", "NN"), ("us", "NN"),
    ("s", "NNS"),
)  # fmt: skip
"""The first that a word of four letters or more has decides."""

_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")


class RuleTagger:
    """Tags by closed classes, numbers, capitals and endings; NN otherwise."""

    name = "rules (closed classes and endings)"

    def tag(self, words: Sequence[str]) -> list[str]:
        return [_tag(word, is_first=number == 0) for number, word in enumerate(words)]


def _tag(word: str, *, is_first: bool) -> str:
    plain = word.lower()
    if not any(letter.isalnum() for letter in plain) and plain not in _OF_WORD:
        return "." if plain in (".", "?", "!") else "SYM"
    if plain in _OF_WORD:
        return _OF_WORD[plain]
    if _NUMBER.fullmatch(plain):
        return "CD"
    if word[0].isupper() and not is_first:
        return "NNP"
    ending = next((tag for ending, tag in ENDINGS if len(plain) > 3 and plain.endswith(ending)), None)
    return ending or "NN"
