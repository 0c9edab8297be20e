"""Words of a question, by characters, and the tokens that stand for them."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from aki_megatron.data.prompt_tokens import PromptToken

_WORD = re.compile(
    r"\d+(?:[.,:/]\d+)*(?!\w)"  # a number, a time, a date
    r"|(?:(?!n't\b)[^\W\d_])+(?=n't\b)|n't\b"  # do + n't
    r"|'(?:s|m|d|re|ve|ll)\b"
    r"|\w+(?:-\w+)*"
    r"|[^\w\s]",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.?!]+(?=\s|$)|\n+")


@dataclass(frozen=True)
class Word:
    """A word, a number or one sign: characters ``start`` to before ``end`` of a prompt."""

    text: str
    start: int
    end: int


def split_words(text: str) -> list[Word]:
    """Return the words of a text in order; clitics are words of their own (do + n't), as in the Penn treebank."""
    plain = text.replace("\u2019", "'")
    return [Word(text[m.start() : m.end()], m.start(), m.end()) for m in _WORD.finditer(plain)]


def split_sentences(words: Sequence[Word], text: str) -> list[list[Word]]:
    """Return the words in sentences: up to a full stop, a question or exclamation mark, or a line break."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)] + [len(text)]
    sentences: list[list[Word]] = [[] for _ in ends]
    number = 0
    for word in words:
        while word.end > ends[number]:
            number += 1
        sentences[number].append(word)
    return [sentence for sentence in sentences if sentence]


def tokens_of_words(words: Sequence[Word], tokens: Iterable[PromptToken]) -> list[list[int]]:
    """Return the positions of each word's tokens; the words are in order.

    A token belongs to the word with which it shares most characters, to the first of several. A token that holds no
    character of a word (spaces, line breaks) is left out.
    """
    found: list[list[int]] = [[] for _ in words]
    ends = [word.end for word in words]
    for token in tokens:
        best, most = 0, 0
        for number in range(bisect_right(ends, token.start), len(words)):
            word = words[number]
            if word.start >= token.end:
                break
            if (shared := min(token.end, word.end) - max(token.start, word.start)) > most:
                best, most = number, shared
        if most:
            found[best].append(token.position)
    return found


def join_words(words: Sequence[Word], tokens: Iterable[PromptToken], text: str) -> list[Word]:
    """Return the words with those joined that a token stands for together, so that every token has one.

    Byte-pair vocabularies have such tokens of signs; the demo's small tokenizer has whole phrases.
    """
    ends = [word.end for word in words]
    first_of = list(range(len(words)))  # the first word of the group that each belongs to
    for token in tokens:
        first = bisect_right(ends, token.start)
        last = first
        while last + 1 < len(words) and words[last + 1].start < token.end:
            last += 1
        for number in range(first + 1, last + 1):
            first_of[number] = first_of[first]
    joined: list[Word] = []
    for number, word in enumerate(words):
        if first_of[number] == number:
            joined.append(word)
        else:
            start = joined.pop().start
            joined.append(Word(text[start : word.end], start, word.end))
    return joined
