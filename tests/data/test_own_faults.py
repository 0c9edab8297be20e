"""Every record of users' own files is a sample or a counted fault that says where it is."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from data_files import image_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_files import chat, config, llava, opened, picture_row, write_jsonl, write_parquet, write_pictures

from aki_megatron.config.data import DataConfig
from aki_megatron.data.run_sources import open_conversations
from aki_megatron.data.template import Template
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation

PNG = "data:image/png;base64,"


def spoken(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


FAULTS: list[tuple[str, Any, str]] = [
    ("llava", [1, 2], "a record must have keys and values"),
    ("llava", '{"conversations": [', "it is not valid JSON: "),
    ("llava", {"image": "0.png"}, "the field 'conversations' is missing"),
    ("llava", {"conversations": []}, "the messages must be a list, and not empty"),
    ("llava", {"conversations": "Hello"}, "the messages must be a list"),
    ("llava", {"conversations": ["Hello", "You"]}, "message 1 must have a role and content"),
    ("llava", {"conversations": [{"value": "A"}]}, "the field 'from' is missing"),
    ("llava", {"conversations": [{"from": "human"}]}, "the field 'value' is missing"),
    ("llava", {"conversations": [{"from": 3, "value": "A"}]}, "message 1 has the unknown role 3"),
    ("messages", spoken(("user", "A"), ("tool", "B")), "message 2 has the unknown role 'tool'; known are user"),
    ("messages", spoken(("assistant", "A"), ("user", "B")), "begins with the assistant"),
    ("messages", spoken(("user", "A"), ("user", "B"), ("assistant", "C")), "messages 1 and 2 are both of the user"),
    ("messages", spoken(("user", "A"), ("assistant", "B"), ("assistant", "C")), "messages 2 and 3 are both of the as"),
    ("messages", chat("A", "B", "C"), "ends with the user; there is no answer to learn"),
    ("messages", spoken(("system", "A")), "ends with the system"),
    ("messages", spoken(("user", "A"), ("system", "B"), ("assistant", "C")), "a system message must be the first"),
    ("messages", spoken(("system", "A"), ("system", "B"), ("user", "C")), "a system message must be the first"),
    ("messages", chat("A", "  "), "answer 1 is empty"),
    ("messages", chat("A", "B", " \n", "C"), "question 2 is empty"),
    ("messages", chat("", "B"), "question 1 is empty"),
    ("messages", chat("A", {"text": "B"}), "the content of message 2 must be text"),
    ("messages", chat("A \ud800", "B"), "half of a surrogate pair"),
    ("messages", chat([{"type": "video", "video": "a.mp4"}], "B"), "unknown type 'video'; known are text, image"),
    ("messages", chat([3], "B"), "a part of message 1 must have a type"),
    ("messages", chat([{"type": "text", "text": None}], "B"), "the text of message 1 must be text"),
    ("messages", chat("A", "B <image>", images=["0.png"]), "message 2, of the assistant, holds an image"),
    ("messages", chat("A", "B", system="<image>", images=["0.png"]), "message 1, of the system, holds an image"),
    ("messages", chat("<image> <image>", "B", images=["0.png"]), "2 placeholders <image> for 1 images"),
    ("messages", chat("<image>", "B"), "1 placeholders <image> for 0 images"),
    ("messages", chat("<image>", "B", images=["0.png", "1.png"]), "1 placeholders <image> for 2 images"),
    ("messages", chat([{"type": "image", "index": 1}], "B", images=["0.png"]), "each of 1 images must be named once"),
    ("messages", chat("<image>", "B", images=[7]), "an image must be a path, a data URL or bytes, got 7"),
    ("messages", chat("<image>", "B", images=[" "]), "an image must be a path"),
    ("messages", chat("<image>", "B", images=[{"path": {"a": 1}}]), "an image must be a path or bytes"),
    ("messages", chat("<image>", "B", images=["https://x.org/a.png"]), "is not on this machine; download the images"),
    ("messages", chat("<image>", "B", images=["s3://bucket/a.png"]), "is not on this machine"),
    ("messages", chat("<image>", "B", images=["file://elsewhere/a.png"]), "is not on this machine"),
    ("messages", chat("<image>", "B", images=["../secret.png"]), "leads out of its folder"),
    ("messages", chat("<image>", "B", images=["a\\..\\..\\b.png"]), "leads out of its folder"),
    ("messages", chat("<image>", "B", images=["a\0.png"]), "leads out of its folder"),
    ("messages", chat("<image>", "B", images=["/etc/passwd"]), "is not below"),
    ("messages", chat("<image>", "B", images=["file:///etc/passwd"]), "is not below"),
    ("messages", chat("<image>", "B", images=["data:text/html,hello"]), "is not data:image/...;base64"),
    ("messages", chat("<image>", "B", images=[f"{PNG}???"]), "holds no valid base64"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    write_pictures(folder)
    return folder


@pytest.mark.parametrize(("format_", "record", "reason"), FAULTS)
def test_a_bad_record_is_counted_with_its_place(root: Path, format_: str, record: Any, reason: str) -> None:
    good = llava("A", "B") if format_ == "llava" else chat("A", "B")
    bad = {**record, "id": "x7"} if isinstance(record, dict) else record
    path = write_jsonl(root / "faults.jsonl", [good, bad, good])
    items = opened(root, format_, path.name).items
    assert len(items) == 2 and items.faults.total == 1
    (line,) = items.faults.lines()
    where = " (id x7)" if isinstance(record, dict) else ""
    assert line.startswith(f"1 x {path}, line 2{where}: ") and reason in line, line
    assert [item.key for item in items] == ["mine/chat/1", "mine/chat/3"]
    if not isinstance(record, str):
        array = root / "faults.json"
        array.write_text(json.dumps([good, bad, good]))
        items = opened(root, format_, array.name).items
        assert len(items) == 2 and items.faults.lines()[0].startswith(f"1 x {array}, entry 1{where}: ")
        assert reason in items.faults.lines()[0]


@pytest.mark.parametrize(("format_", "record", "reason"), [fault for fault in FAULTS if fault[0] == "messages"])
def test_a_bad_row_is_an_error_when_it_is_drawn(root: Path, format_: str, record: Any, reason: str) -> None:
    """Messages as JSON text, so that a table can hold every fault; images as structs where they are paths."""
    images = [{"bytes": None, "path": image} for image in record.get("images", []) if isinstance(image, str)]
    if "\ud800" in str(record) or len(images) != len(record.get("images", [])):
        pytest.skip("no table holds this")
    rows = [{"messages": json.dumps(record["messages"]), "images": images, "id": "x7"}, picture_row(1)]
    rows[1] = {**rows[1], "messages": json.dumps(rows[1]["messages"])}
    path = write_parquet(root / "faults.parquet", rows)
    source = opened(root, "parquet", path.name)
    assert len(source.items) == 2 and source.items[1].turns
    for read in (source.items.__getitem__, source.read_text):
        with pytest.raises(DataError) as caught:
            read(0)
        assert str(caught.value).startswith(f"{path}, row 0") and "(id x7)" in str(caught.value)
        assert reason in str(caught.value)


def test_faults_are_tolerated_up_to_the_budget(root: Path) -> None:
    bad = [chat("A", "")] * 9
    write_jsonl(root / "many.jsonl", [*[chat("A", "B")] * 11, *bad])
    lines: list[str] = []

    def run(fraction: float, path: str = "many.jsonl") -> int:
        data = DataConfig(kind="conversations", root=root, sources=(config("messages", path),),
                          tokenizer=root, max_text_tokens=64, max_bad_fraction=fraction)  # fmt: skip
        return len(open_conversations(data, lines.append)["mine"].items)

    assert run(0.5) == 11
    assert lines == [
        f"source mine: 9 of 20 records cannot be used, the first of each kind:\n  9 x {root}/many.jsonl, line 12: "
        "answer 1 is empty"
    ]
    with pytest.raises(DataError, match=r"9 of 20 records .*\n.*\nThat is more than data.max_bad_fraction=0.001"):
        run(0.001)
    write_jsonl(root / "none.jsonl", bad[:1])
    with pytest.raises(DataError, match=r"source mine has no sample in none.jsonl.\n  1 x "):
        run(1.0, "none.jsonl")


def test_a_file_that_cannot_be_read_is_named(root: Path) -> None:
    (root / "torn.json").write_text('[{"conversations": [')
    (root / "torn.parquet").write_bytes(write_parquet(root / "whole.parquet", [picture_row(0)]).read_bytes()[:300])
    (root / "latin.json").write_bytes('[{"id": "ä"}]'.encode("latin-1"))
    for name, format_ in (("torn.json", "llava"), ("latin.json", "llava"), ("torn.parquet", "parquet")):
        with pytest.raises(DataError, match=name):
            opened(root, format_, name)


def test_an_image_of_a_table_that_is_missing_makes_a_bad_sample_when_it_is_decoded(root: Path) -> None:
    """Its text is good, so that the length of the sample is known before its image is read."""
    row = {**picture_row(0), "images": [{"bytes": None, "path": None}]}
    write_parquet(root / "empty.parquet", [picture_row(1), row])
    source = opened(root, "parquet", "empty.parquet")
    assert source.items[1].images == [b""] and source.read_text(1).images == [b""]


TEXT = st.sampled_from(["A", "", "<image>", "x <image> y <image>", "  ", "\ud800", "\u00e9", "<|end|>"])
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "text", "image"]), inner),
    max_leaves=4,
)
PART = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", "audio"])},
    optional={"text": TEXT, "image": st.sampled_from(["0.png", "../0.png", "http://x/0.png"]), "image_url": VALUE},
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": TEXT | st.lists(PART, max_size=3)}
)
RECORD = st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, max_size=4)},
    optional={"images": st.lists(st.sampled_from(["0.png", "1.png", "/etc/passwd", "a\0"]), max_size=2), "id": VALUE},
)
GOOD = st.builds(
    lambda count, turns: chat(*["<image>" * count, "B", *["C", "D"] * turns], images=["0.png"] * count),
    st.integers(0, 3),
    st.integers(0, 2),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(RECORD | VALUE | GOOD, min_size=1, max_size=12), split=st.booleans(), seed=st.integers(0, 9))
def test_every_record_is_a_sample_or_a_fault(
    root: Path, records: list[Any], split: bool, seed: int, make_session_template: Template
) -> None:
    texts = [json.dumps(record) for record in records]
    damaged = random.Random(seed).randrange(len(texts))
    texts[damaged] = texts[damaged][: max(1, len(texts[damaged]) // 2)]
    path = write_jsonl(root / "any.jsonl", texts)
    whole = opened(root, "messages", path.name).items
    assert len(whole) + whole.faults.total == len(records)
    for sample in whole:
        assert isinstance(sample, Conversation) and sample.turns
        try:
            rendered = make_session_template.render_conversation(sample)
        except DataError as error:
            assert "special token" in str(error)
        else:
            assert rendered is not None and len(rendered.media) == len(sample.media)
    if split:
        turns = opened(root, "messages", path.name, split_turns=True).items
        assert turns.faults.counts == whole.faults.counts
        assert [turn.response for one in turns for turn in one.turns] == [
            turn.response for one in whole for turn in one.turns
        ]


def test_bytes_of_images_are_those_of_the_row(root: Path) -> None:
    write_parquet(root / "rows.parquet", [picture_row(number) for number in range(9)], row_group_size=2)
    items = opened(root, "parquet", "rows.parquet").items
    for number in (8, 0, 5, 5, 2):
        assert items[number].images == [image_bytes(number, form="PNG")] and f"r{number}.{number}" in items[number].key
