"""Find the caption in the txt member of a caption shard: a table of formats, each a pure function of the raw text."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aki_megatron.config.datasets import OCR_GRANULARITIES, OFFICIAL_INDEX
from aki_megatron.errors import ConfigError, DataError
from aki_megatron.types import BYTE_ORDER_MARK

_OCR_LIST = re.compile(r'\s*"?\s*\[\s*\{\s*\\?"(?:text|granularity|include_datacomp_raw_cap)\\?"\s*:')
"""The beginning of BLIP3-OCR's JSON list, also of one that was cut off or written as a JSON string."""


@dataclass(frozen=True)
class TextFormat:
    """How the caption is found in a txt member; ``granularity`` chooses among the descriptions of BLIP3-OCR.

    Raises ConfigError for a name that does not exist.
    """

    name: str = "caption"
    granularity: str = "basic text"

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ConfigError(f"There is no caption format {self.name!r}; choose from {', '.join(FORMATS)}.")
        if self.granularity not in (known := (*OCR_GRANULARITIES, OFFICIAL_INDEX)):
            raise ConfigError(f"There is no OCR granularity {self.granularity!r}; choose from {', '.join(known)}.")


def caption_text(raw: str, text_format: TextFormat | None = None, *, location: str = "") -> str:
    """Return the caption in ``raw``, a decoded txt member.

    Raises DataError, its message after ``location`` (tar and key), if there is none.
    """
    text_format = text_format or TextFormat()
    try:
        return FORMATS[text_format.name](raw.removeprefix(BYTE_ORDER_MARK), text_format)
    except DataError as error:
        raise DataError(f"{location}: {error}" if location else str(error)) from error


def is_blip3_ocr(raw: str) -> bool:
    """Return whether a txt member holds BLIP3-OCR's JSON list, as its beginning says."""
    return _OCR_LIST.match(raw.removeprefix(BYTE_ORDER_MARK)) is not None


def _plain(raw: str, text_format: TextFormat) -> str:
    """Return the text: it is the caption (BLIP3-KALE, CC3M, CC12M). Raises DataError for the JSON of BLIP3-OCR."""
    if is_blip3_ocr(raw):
        raise DataError(
            f"the text is the JSON list of BLIP3-OCR (it begins {raw[:40]!r}), which data.captions.format: caption "
            "would train as it stands; set format: blip3_ocr."
        )
    return raw


def _blip3_ocr(raw: str, text_format: TextFormat) -> str:
    """Parse the dataset's ``captions`` column: a JSON list of {text, granularity, include_datacomp_raw_cap}."""
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the text is not the JSON list of BLIP3-OCR: {error} (it begins {raw[:40]!r}).") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"the text is JSON but no list of descriptions (it begins {raw[:40]!r}).")
    text = _find_description(entries, text_format).get("text")
    if not isinstance(text, str):
        raise DataError(f"the description of granularity {text_format.granularity!r} has no text.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold one half of a pair alone; no tokenizer takes it
        raise DataError(
            f"character {error.start + 1} of the description is half a surrogate pair "
            f"(\\u{ord(text[error.start]):04x}); the text was cut in the middle of a character."
        ) from error
    return text.removeprefix(BYTE_ORDER_MARK)


def _find_description(entries: list[dict[str, Any]], text_format: TextFormat) -> dict[str, Any]:
    """Return the description of the granularity asked for, without the raw web caption that some have added."""
    if text_format.granularity == OFFICIAL_INDEX:
        if len(entries) < 2:
            raise DataError(f"granularity {OFFICIAL_INDEX!r} needs two descriptions, there are {len(entries)}.")
        return entries[1]
    level = OCR_GRANULARITIES[text_format.granularity]
    kinds = [(entry.get("granularity"), bool(entry.get("include_datacomp_raw_cap", False))) for entry in entries]
    if (level, False) not in kinds:
        raise DataError(
            f"no description of granularity {level} ({text_format.granularity}) without the raw caption; there are "
            f"(granularity, raw caption) {kinds}."
        )
    return entries[kinds.index((level, False))]


FORMATS: dict[str, Callable[[str, TextFormat], str]] = {"caption": _plain, "blip3_ocr": _blip3_ocr}
"""Format name -> parser of the raw text; the names are config.datasets.CAPTION_FORMATS. Parsers raise DataError."""
