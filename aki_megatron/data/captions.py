"""What the txt member of a caption shard means: a table of formats, each a pure function of the raw text."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aki_megatron.errors import ConfigError, DataError

GRANULARITIES = {
    "basic text": 0,
    "positions": 1,
    "fractions": 2,
    "coarse coordinates": 3,
    "fine coordinates": 4,
    "boxes": 5,
}
"""BLIP3-OCR-200M's granularities by name.

    basic text          The image contains the text "X", the text "Y" (the papers' level 1)
    positions           ... located at the top right corner
    fractions           ... located at fractions of width and height
    coarse coordinates  ... at coordinates of few digits
    fine coordinates    ... at coordinates of more digits
    boxes               <ocr>X</ocr><bbox>[x1, y1][x2, y2]</bbox>
"""

OFFICIAL_INDEX = "official index"
"""The released code's choice: the second element of the list, whatever it is (granularity 1 in the public files)."""


@dataclass(frozen=True)
class TextFormat:
    """How the caption is found in a txt member; a row of FORMATS and, for BLIP3-OCR, which of its descriptions.

    ``include_datacomp_raw_cap`` asks for the description that the raw web caption was added to.
    Raises ConfigError for a name that does not exist.
    """

    name: str = "caption"
    granularity: str = "basic text"
    include_datacomp_raw_cap: bool = False

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ConfigError(f"There is no caption format {self.name!r}; choose from {', '.join(FORMATS)}.")
        if self.granularity not in (*GRANULARITIES, OFFICIAL_INDEX):
            known = ", ".join((*GRANULARITIES, OFFICIAL_INDEX))
            raise ConfigError(f"There is no OCR granularity {self.granularity!r}; choose from {known}.")
        if self.granularity == OFFICIAL_INDEX and self.include_datacomp_raw_cap:
            raise ConfigError(
                f"The granularity {OFFICIAL_INDEX!r} takes the second description whatever it is; "
                "include_datacomp_raw_cap cannot be chosen with it."
            )


def caption_text(raw: str, form: TextFormat | None = None, *, where: str = "") -> str:
    """The caption in ``raw``, a decoded txt member; DataError, begun with ``where`` (tar and key), if there is none."""
    form = form or TextFormat()
    try:
        return FORMATS[form.name](raw, form)
    except DataError as error:
        raise DataError(f"{where}: {error}" if where else str(error)) from error


def _plain(raw: str, form: TextFormat) -> str:
    """The text is the caption."""
    return raw


def _blip3_ocr(raw: str, form: TextFormat) -> str:
    """The text is the dataset's ``captions`` column: a JSON list of {text, granularity, include_datacomp_raw_cap}."""
    try:
        entries = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the text is not the JSON list of BLIP3-OCR: {error} (it begins {raw[:40]!r}).") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(f"the text is JSON but no list of descriptions (it begins {raw[:40]!r}).")
    text = _chosen(entries, form).get("text")
    if not isinstance(text, str):
        raise DataError(f"the description of granularity {form.granularity!r} has no text.")
    return text


def _chosen(entries: list[dict[str, Any]], form: TextFormat) -> dict[str, Any]:
    """The description that the format asks for."""
    if form.granularity == OFFICIAL_INDEX:
        if len(entries) < 2:
            raise DataError(f"granularity {OFFICIAL_INDEX!r} needs two descriptions, there are {len(entries)}.")
        return entries[1]
    wanted = (GRANULARITIES[form.granularity], form.include_datacomp_raw_cap)
    kinds = [(entry.get("granularity"), bool(entry.get("include_datacomp_raw_cap", False))) for entry in entries]
    if wanted not in kinds:
        raise DataError(
            f"no description of granularity {wanted[0]} ({form.granularity}) "
            f"{'with' if wanted[1] else 'without'} the raw caption; there are (granularity, raw caption) {kinds}."
        )
    return entries[kinds.index(wanted)]


FORMATS: dict[str, Callable[[str, TextFormat], str]] = {
    "caption": _plain,
    "blip3_kale": _plain,
    "cc3m": _plain,
    "cc12m": _plain,
    "blip3_ocr": _blip3_ocr,
    "blip3_ocr_200m": _blip3_ocr,
}
"""Format name -> parser of the raw text. A new dataset is one more row. Parsers raise DataError without the place."""
