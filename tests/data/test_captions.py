"""The caption in a txt member: plain text, and BLIP3-OCR's descriptions by the name of their granularity."""

import json

import pytest

from aki_megatron.config.datasets import CAPTION_FORMATS, OCR_GRANULARITIES, OFFICIAL_INDEX
from aki_megatron.data.captions import FORMATS, TextFormat, caption_text
from aki_megatron.errors import ConfigError, DataError

# the twelve descriptions of one image, in the order of the public files
TWELVE = [
    {"text": f"{'raw, ' if raw else ''}level {level}", "granularity": level, "include_datacomp_raw_cap": raw}
    for raw in (False, True)
    for level in range(6)
]


def ocr(entries: object = TWELVE, **choice) -> str:
    return caption_text(json.dumps(entries), TextFormat("blip3_ocr", **choice), location="Tar a.tar, key 7")


def test_every_format_a_configuration_may_name_exists() -> None:
    assert list(FORMATS) == list(CAPTION_FORMATS)


def test_a_plain_caption_is_the_text_itself() -> None:
    assert caption_text(" [1] {zw\u00f6lf}\n", TextFormat("caption")) == " [1] {zw\u00f6lf}\n"
    assert caption_text("a cat") == "a cat"


def test_granularities_by_name() -> None:
    assert ocr() == "level 0"  # the papers' level 1, basic text
    for name, level in OCR_GRANULARITIES.items():
        assert ocr(granularity=name) == f"level {level}"
        assert ocr(TWELVE[::-1], granularity=name) == f"level {level}"  # found by its granularity, not by its position
    assert sorted(OCR_GRANULARITIES.values()) == list(range(6))


def test_the_official_index_is_the_second_whatever_it_is() -> None:
    assert ocr(granularity=OFFICIAL_INDEX) == "level 1"
    assert ocr(TWELVE[5:], granularity=OFFICIAL_INDEX) == "raw, level 0"
    with pytest.raises(DataError, match=r"^Tar a\.tar, key 7: .* needs two descriptions, there are 1"):
        ocr(TWELVE[:1], granularity=OFFICIAL_INDEX)


def test_an_entry_without_the_raw_caption_flag_has_none() -> None:
    assert ocr([{"text": "x", "granularity": 0}]) == "x"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("The image contains", "is not the JSON list of BLIP3-OCR: .*it begins 'The image contains'"),
        ("", "is not the JSON list"),
        ("[" * 100_000, "is not the JSON list"),
        ('{"text": "x"}', "JSON but no list of descriptions"),
        ('["x", "y"]', "JSON but no list of descriptions"),
        ("[]", "no description of granularity 0 .basic text. without the raw caption"),
        (json.dumps(TWELVE[1:6]), r"there are .* \[\(1, False\), \(2, False\)"),
        ('[{"granularity": 0}]', "has no text"),
        ('[{"granularity": 0, "text": 5}]', "has no text"),
    ],
)
def test_bad_json_names_tar_and_key(raw: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)^Tar a\.tar, key 7: .*{message}"):
        caption_text(raw, TextFormat("blip3_ocr"), location="Tar a.tar, key 7")


def test_wrong_choices_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match="no caption format 'ocr'; choose from caption, .*blip3_ocr"):
        TextFormat("ocr")
    with pytest.raises(ConfigError, match="no OCR granularity 'level 1'; choose from basic text, .*official index"):
        TextFormat("blip3_ocr", "level 1")


@pytest.mark.parametrize("text_format", [TextFormat("caption"), TextFormat("blip3_ocr")])
def test_a_byte_order_mark_is_no_part_of_the_text(text_format: TextFormat) -> None:
    raw = json.dumps(TWELVE) if text_format.name == "blip3_ocr" else "a caption"
    assert caption_text(f"\ufeff{raw}", text_format) == caption_text(raw, text_format)


def test_a_byte_order_mark_in_a_description_is_no_part_of_it() -> None:
    assert ocr([{"text": "\ufeffa sign", "granularity": 0}]) == "a sign"


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps(TWELVE),
        json.dumps(TWELVE, indent=1),
        json.dumps(TWELVE)[:50],
        json.dumps(json.dumps(TWELVE)),
        json.dumps([dict(reversed(entry.items())) for entry in TWELVE]),
    ],
    ids=["as published", "indented", "cut off", "as a JSON string", "other order"],
)
def test_the_json_of_blip3_ocr_is_not_a_plain_caption(raw: str) -> None:
    with pytest.raises(DataError, match=r"^Tar a\.tar, key 7: the text is the JSON list of BLIP3-OCR .*blip3_ocr\.$"):
        caption_text(raw, TextFormat("caption"), location="Tar a.tar, key 7")


@pytest.mark.parametrize("raw", ["[text] {x}", '["a", "b"]', "[{}]", '"text": a sign', '[{"name": 1}]'])
def test_captions_that_look_like_json_are_captions(raw: str) -> None:
    assert caption_text(raw, TextFormat("caption")) == raw
