"""Prompt profiles: how a question of a benchmark is put to the model.

    table6      the texts of the paper's Table 6, in the layout of fine-tuning (of AKI: <image>, a line break, the text)
    vlmevalkit  what the authors' public adapter for VLMEvalKit sends: the kit's texts, <image> without a line break,
                where the kit has it (of MMMU the text may come before it)

Both show the first image of a question only, as the authors' code does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."
YES_NO = "Please answer yes or no."

CHOICE_BENCHMARKS = frozenset(("MMBench", "SEED-Bench", "MMMU", "RealWorldQA", "CV-Bench"))
YES_NO_BENCHMARKS = frozenset(("MME", "POPE"))

IMAGE_MARKER = "<image "
"""In the text of MMMU, followed by a digit and ``>``."""


@dataclass(frozen=True)
class ImagePart:
    """Where in a prompt an image stands; ``number`` counts the question's images from 0."""

    number: int


PromptPart = str | ImagePart


@dataclass(frozen=True)
class PromptProfile:
    """A way to put questions.

    places_image    whether the image stands where ``parts`` has it; otherwise the template puts it where it does in
                    fine-tuning
    max_new_tokens  of a reply, as in the authors' script of this profile
    """

    name: str
    text: Callable[[BenchmarkQuestion], str]
    places_image: bool
    max_new_tokens: int

    def parts(self, question: BenchmarkQuestion) -> tuple[PromptPart, ...]:
        """Return the user's turn as texts and at most one image, the first that it shows."""
        text = self.text(question)
        if self.places_image and question.benchmark == "MMMU" and IMAGE_MARKER in text:
            return _first_image_only(_split_at_markers(text))
        return (ImagePart(0), text)


def options_text(choices: Mapping[str, str]) -> str:
    """Return the options, one a line, with their letters; ends with a line break."""
    return "".join(f"{letter}. {text}\n" for letter, text in choices.items())


def table6_text(question: BenchmarkQuestion) -> str:
    """Return the text of the paper's Table 6.

    A question without options on a benchmark of choices is asked as the short-answer questions are: the table has no
    text for it.
    """
    text = question.text
    if question.benchmark in YES_NO_BENCHMARKS:
        # the files' own instruction would be there twice
        return f"{SHORT} {text.strip().removesuffix(YES_NO).rstrip()} {YES_NO}"
    if question.benchmark not in CHOICE_BENCHMARKS:
        return text
    if not question.choices:
        return f"{SHORT} {text}"
    if question.benchmark == "MMBench":
        text = f"Question: {text}"
        text = f"Hint: {question.hint}\n{text}" if question.hint else text
    return f"{LETTER} {text}\nOptions:\n{options_text(question.choices)}"


def vlmevalkit_text(question: BenchmarkQuestion) -> str:
    """Return the text that VLMEvalKit builds by default."""
    if question.benchmark == "CV-Bench" and question.details.get("prompt"):
        return str(question.details["prompt"])
    if question.benchmark not in CHOICE_BENCHMARKS:
        return question.text
    hint = f"Hint: {question.hint}\n" if question.hint else ""
    text = f"{hint}Question: {question.text}\n"
    if not question.choices:
        return text
    return (
        f"{text}Options:\n{options_text(question.choices)}Please select the correct answer from the options above. \n"
    )


def _split_at_markers(text: str) -> list[PromptPart]:
    """Split a text at ``<image 1>`` ...; anything else that looks like a marker stays text."""
    first, *rest = text.split(IMAGE_MARKER)
    parts: list[PromptPart] = [first] if first else []
    for piece in rest:
        if len(piece) > 1 and piece[0] in "123456789" and piece[1] == ">":
            parts.append(ImagePart(int(piece[0]) - 1))
            piece = piece[2:]
        else:
            piece = IMAGE_MARKER + piece
        if piece:
            parts.append(piece)
    return parts


def _first_image_only(parts: list[PromptPart]) -> tuple[PromptPart, ...]:
    images = [part for part in parts if isinstance(part, ImagePart)]
    if not images:
        return (ImagePart(0), *parts)
    kept: list[PromptPart] = []
    is_shown = False
    for part in parts:
        if isinstance(part, str):
            kept.append(part)
        elif not is_shown:
            kept.append(part)
            is_shown = True
    return tuple(kept)


TABLE6 = PromptProfile("table6", table6_text, places_image=False, max_new_tokens=256)
VLMEVALKIT = PromptProfile("vlmevalkit", vlmevalkit_text, places_image=True, max_new_tokens=512)

PROFILES: dict[str, PromptProfile] = {profile.name: profile for profile in (TABLE6, VLMEVALKIT)}
"""By name; the first is the default."""
