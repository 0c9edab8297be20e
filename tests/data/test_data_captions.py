"""What a txt member means: plain captions, and BLIP3-OCR's descriptions by the name of their granularity."""

import json

import pytest

from aki_megatron.data.captions import FORMATS, GRANULARITIES, OFFICIAL_INDEX, TextFormat, caption_text
from aki_megatron.errors import ConfigError, DataError

# the twelve descriptions of one picture, in the order of the public files
TWELVE = [
    {"text": f"{'raw, ' if raw else ''}level {level}", "granularity": level, "include_datacomp_raw_cap": raw}
    for raw in (False, True)
    for level in range(6)
]


def ocr(entries: object = TWELVE, **choice) -> str:
    return caption_text(json.dumps(entries), TextFormat("blip3_ocr", **choice), where="Tar a.tar, key 7")


@pytest.mark.parametrize("name", ["caption", "blip3_kale", "cc3m", "cc12m"])
def test_a_plain_caption_is_the_text_itself(name: str) -> None:
    assert caption_text(" [1] {zw\u00f6lf}\n", TextFormat(name)) == " [1] {zw\u00f6lf}\n"
    assert caption_text("a cat") == "a cat"


def test_granularities_by_name() -> None:
    assert ocr() == "level 0"  # the papers' level 1, basic text
    for name, level in GRANULARITIES.items():
        assert ocr(granularity=name) == f"level {level}"
        assert ocr(granularity=name, include_datacomp_raw_cap=True) == f"raw, level {level}"
        assert ocr(TWELVE[::-1], granularity=name) == f"level {level}"  # found by what it is, not by its place
    assert sorted(GRANULARITIES.values()) == list(range(6))
    assert "blip3_ocr_200m" in FORMATS


def test_the_official_index_is_the_second_whatever_it_is() -> None:
    assert ocr(granularity=OFFICIAL_INDEX) == "level 1"
    assert ocr(TWELVE[5:], granularity=OFFICIAL_INDEX) == "raw, level 0"
    with pytest.raises(DataError, match=r"^Tar a\.tar, key 7: .* needs two descriptions, there are 1"):
        ocr(TWELVE[:1], granularity=OFFICIAL_INDEX)


def test_an_entry_without_the_raw_caption_flag_has_none() -> None:
    assert ocr([{"text": "x", "granularity": 0}]) == "x"


@pytest.mark.parametrize(
    ("raw", "said"),
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
def test_bad_json_names_tar_and_key(raw: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"(?s)^Tar a\.tar, key 7: .*{said}"):
        caption_text(raw, TextFormat("blip3_ocr"), where="Tar a.tar, key 7")


def test_wrong_choices_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match="no caption format 'ocr'; choose from caption, .*blip3_ocr"):
        TextFormat("ocr")
    with pytest.raises(ConfigError, match="no OCR granularity 'level 1'; choose from basic text, .*official index"):
        TextFormat("blip3_ocr", "level 1")
    with pytest.raises(ConfigError, match="cannot be chosen with it"):
        TextFormat("blip3_ocr", OFFICIAL_INDEX, True)
