"""Multiple choice: options in a seeded order, and the letter of the correct one."""

from collections.abc import Sequence
from hashlib import blake2b
from string import ascii_uppercase


def letter_options(choices: Sequence[str], correct: int, key: str) -> tuple[str, str]:
    """Return shuffled option lines ``A. text`` and the letter of the correct one; a pure function of its arguments.

    Nothing is changed in place: the release shuffles the stored list and keeps the stored index, so that from the
    second access on its letter is wrong.
    """
    order = shuffled_indices(len(choices), key)
    lines = [f"{letter}. {choices[index]}" for letter, index in zip(ascii_uppercase, order, strict=False)]
    return "\n".join(lines), ascii_uppercase[order.index(correct)]


def shuffled_indices(count: int, key: str) -> list[int]:
    """Return an order of 0 ... count-1 that depends on the key alone."""
    return sorted(range(count), key=lambda i: blake2b(f"{key}\x1f{i}".encode(), digest_size=8).digest())


def check_choice(correct: int, choices: Sequence[str], field: str) -> None:
    """Raise ValueError unless ``correct`` (the value of ``field``) is the index of one of at most 26 choices."""
    if not 0 <= correct < len(choices) <= len(ascii_uppercase):
        raise ValueError(f"{field}={correct} of {len(choices)} choices")
