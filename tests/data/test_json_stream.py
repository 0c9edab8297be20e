"""JSON read entry by entry equals JSON read at once, wherever the window ends; packed records equal a list."""

import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_files import put

from aki_megatron.data.sources import json_stream, open_sources
from aki_megatron.data.sources.json_stream import JsonLocation, iter_array, iter_object, iter_object_arrays
from aki_megatron.data.sources.records import PackedRecords
from aki_megatron.errors import DataError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


class Record(NamedTuple):
    number: int
    text: str
    more: list[Any]


def read_in_chunks(monkeypatch: pytest.MonkeyPatch, file: Path, chunk: int, read: Callable[[Path], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        return read(file)


@given(value=st.lists(VALUES, max_size=5), chunk=st.integers(1, 40), indent=st.sampled_from([None, 2]))
def test_an_array_equals_its_elements(
    tmp_path_factory: pytest.TempPathFactory, value: list[Any], chunk: int, indent: int | None
) -> None:
    file = tmp_path_factory.mktemp("json") / "a.json"
    file.write_text(json.dumps(value, ensure_ascii=len(value) % 2 == 0, indent=indent) + "\n", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        found = read_in_chunks(patch, file, chunk, lambda path: list(iter_array(path)))
    assert found == [(JsonLocation("", number), element) for number, element in enumerate(value)]


@given(
    value=st.dictionaries(st.text(max_size=5), VALUES | st.lists(VALUES, max_size=3), max_size=4),
    chunk=st.integers(1, 40),
)
def test_an_object_equals_its_entries(
    tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any], chunk: int
) -> None:
    file = tmp_path_factory.mktemp("json") / "a.json"
    file.write_text(json.dumps(value))
    arrays = [name for name, entry in value.items() if isinstance(entry, list)]
    with pytest.MonkeyPatch.context() as patch:
        assert read_in_chunks(patch, file, chunk, lambda path: list(iter_object(path))) == [
            (JsonLocation(name), entry) for name, entry in value.items()
        ]
        found = read_in_chunks(patch, file, chunk, lambda path: list(iter_object_arrays(path, *arrays)))
    assert found == [
        pair
        for name, entry in value.items()
        for pair in (
            [(JsonLocation(name, i), e) for i, e in enumerate(entry)]
            if name in arrays
            else [(JsonLocation(name), entry)]
        )
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[1, 2, {"a": }]', r"a\.json is not valid JSON: Expecting value \(line 1, column 14, character 13\)"),
        ("[1 2]", r"Expecting ',', got '2' \(line 1, column 4, character 3\)"),
        ("[1, 2", r"Expecting ',', got the end of the file \(line 1, column 6, character 5\)"),
        ("[1, 2] []", r"Extra data \(line 1, column 8, character 7\)"),
        ('{"a": [1]}', r"Expecting '\[', got '\{' \(line 1, column 1, character 0\)"),
        ("", r"a\.json is not valid JSON but empty \(0 bytes\)"),
        (" ", r"Expecting '\[', got the end of the file \(line 1, column 2, character 1\)"),
        ("[1,\n 2,\n\n  3 4]", r"Expecting ',', got '4' \(line 4, column 5, character 13\)"),
        ('[1,\n{"a": 1,\n"b" 2}]', r"Expecting ':' delimiter \(line 3, column 5, character 17\)"),
        ('["a\nb"]', "Invalid control character"),
        ("[" * 200_000, "a value is nested too deeply"),
    ],
)
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_invalid_json_is_named_with_its_character(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, message: str, chunk: int
) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_in_chunks(monkeypatch, tmp_path / "a.json", chunk, lambda path: list(iter_array(path)))


def test_bytes_that_are_no_utf_8_are_named_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'[\n"' + b"x" * 9000 + b'",\n"caf\xe9"]')
    with pytest.raises(DataError, match=r"it is not UTF-8 \(line 3, byte 9010 of the file: 0xe9\)"):
        list(iter_array(tmp_path / "a.json"))


def test_an_integer_of_thousands_of_digits_is_infinite(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1, " + "9" * 5000 + ', {"a": -' + "9" * 5000 + "}, 2]")
    values = [value for _, value in iter_array(tmp_path / "a.json")]
    assert values == [1, float("inf"), {"a": float("-inf")}, 2]


def test_a_byte_order_mark_and_spaces_are_no_errors(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf \r\n [ 1 ,\t2 ] \n")
    assert [value for _, value in iter_array(tmp_path / "a.json")] == [1, 2]
    with pytest.raises(DataError, match=r"b\.json does not exist"):
        list(iter_array(tmp_path / "b.json"))


@given(
    records=st.lists(
        st.builds(Record, st.integers(), st.text(), st.lists(st.text(max_size=3), max_size=3)), max_size=8
    ),
    data=st.data(),
)
@settings(max_examples=60)
def test_packed_records_equal_a_list(records: list[Record], data: st.DataObject) -> None:
    packed = PackedRecords(iter(records), Record._make)
    assert len(packed) == len(records) and list(packed) == records
    part = data.draw(st.slices(len(records)))
    assert list(packed[part]) == records[part]
    for index in (*range(-len(records), len(records)),):
        assert packed[index] == records[index]
    for index in (len(records), -len(records) - 1):
        with pytest.raises(IndexError):
            packed[index]
    assert list(pickle.loads(pickle.dumps(packed))) == records


def visual_genome(root: Path, num_images: int, regions: int) -> Path:
    """Write synthetic files in Visual Genome's layout; return the region file."""
    content = [
        {"id": image, "regions": [
            {"region_id": image * regions + number, "image_id": image, "x": number, "y": 2 * number, "width": 82,
             "height": 139, "phrase": f"the clock number {number} is green in colour"}
            for number in range(regions)]}
        for image in range(num_images)
    ]  # fmt: skip
    put(root, "VisualGenome/image_data.json", [{"image_id": p, "width": 800, "height": 600} for p in range(num_images)])
    put(root, "VisualGenome/images/keep", b"")
    return put(root, "VisualGenome/region_descriptions.json", content)


def test_reading_never_holds_a_whole_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """20,000 regions: under 100 bytes a record at rest; reading takes little more, far less than parsing at once."""
    monkeypatch.setattr(json_stream, "CHUNK", 2**14)
    file = visual_genome(tmp_path, num_images=400, regions=50)

    def traced(read: Callable[[], Any]) -> tuple[Any, int, int]:
        tracemalloc.start()
        value = read()
        at_rest, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return value, at_rest, peak

    samples, at_rest, peak = traced(lambda: open_sources(tmp_path, ["visualgenome"], "train")["visualgenome"])
    assert len(samples) == 20_000 and samples[19_999].turns[0].response == "the clock number 49 is green in colour"
    assert at_rest < 100 * len(samples), at_rest
    _, _, at_once = traced(lambda: json.loads(file.read_bytes()))
    assert peak < 2.5 * at_rest and 2 * peak < at_once, (at_rest, peak, at_once)


def test_opened_sources_go_to_another_process(tmp_path: Path) -> None:
    visual_genome(tmp_path, num_images=2, regions=2)
    samples = open_sources(tmp_path, ["visualgenome"], "train")["visualgenome"]
    assert list(pickle.loads(pickle.dumps(samples))) == list(samples)
