"""Conversations in users' own files: what each format may hold, other names, turns, order of files."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from data_files import image_bytes
from own_files import chat, llava, opened, picture_row, write_jsonl, write_parquet, write_pictures

from aki_megatron.data.template import Template
from aki_megatron.errors import DataError
from aki_megatron.types import Conversation, Modality


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    return tmp_path


def marked(conversation: Conversation) -> list[str]:
    """Return the prompts with a mark where each image stands."""
    found = []
    for turn in conversation.turns:
        text = turn.prompt
        for placeholder in reversed(turn.placeholders):
            text = text[: placeholder.offset] + "#" + text[placeholder.offset :]
        found.append(text)
    return found


def names(conversation: Conversation) -> list[Any]:
    return [image.name if isinstance(image, Path) else len(image) for image in conversation.images]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_llava_records_with_any_number_of_images_where_they_stand(root: Path, suffix: str) -> None:
    records = [
        llava("<image>\nWhat?", "Red.", image="0.png", id="a/b c"),
        llava("One <image> and <image>?", "Two.", "And <image>", "Three.", image=["0.png", "1.png", "2.png"]),
        llava("Only text?", "Yes."),
        llava("Which?", "This.", image="3.png"),
    ]
    records[1]["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    if suffix == "json":
        (root / "chat.json").write_text("\ufeff " + json.dumps(records))
    else:
        write_jsonl(root / "chat.jsonl", ["\ufeff" + json.dumps(records[0]), "", *records[1:]])
    source = opened(root, "llava", f"chat.{suffix}")
    first, second, third, fourth = source.items
    assert marked(first) == ["#\nWhat?"] and names(first) == ["0.png"] and first.images[0] == root / "pics/0.png"
    assert marked(second) == ["One # and #?", "And #"] and names(second) == ["0.png", "1.png", "2.png"]
    assert [turn.response for turn in second.turns] == ["Two.", "Three."] and second.system_message == "Be brief."
    assert marked(third) == ["Only text?"] and not third.media and third.system_message is None
    assert marked(fourth) == ["Which?"] and names(fourth) == ["3.png"]  # in front, as AKI's own format has it
    assert first.key == ("mine/chat/a_b_c.1" if suffix == "jsonl" else "mine/chat/a_b_c.0")
    assert source.locate(1) == f"{root}/chat.{suffix}, {'line 3' if suffix == 'jsonl' else 'entry 1'}"
    assert not source.items.faults.total and source.counts is None


def test_messages_with_parts_paths_and_data_urls(root: Path) -> None:
    data = image_bytes(9, form="PNG")
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    parts = [
        {"type": "text", "text": "A "},
        {"type": "image_url", "image_url": {"url": url}},
        " b ",
        {"type": "image", "path": "1.png"},
        {"type": "image_url", "image_url": f"file://{root}/pics/2.png"},
        {"type": "image", "image": str(root / "pics/3.png")},
        {"type": "image"},
        {"type": "text", "text": " c <image>"},
    ]
    record = chat(parts, [{"type": "text", "text": "D."}], system="", images=["4.png", {"path": "5.png"}])
    write_jsonl(root / "chat.jsonl", [record])
    (found,) = opened(root, "messages", "chat.jsonl").items
    assert marked(found) == ["A # b #### c #"] and found.turns[0].response == "D." and found.system_message == ""
    assert found.images[0] == data
    assert [image.name for image in found.images[1:]] == ["1.png", "2.png", "3.png", "4.png", "5.png"]
    assert all(image.is_file() for image in found.images[1:])


IMAGE = {"bytes": image_bytes(1, form="PNG"), "path": None}
PAIRS = [{"user": "What?", "assistant": "Red."}, {"user": "And?", "assistant": "Blue."}]


@pytest.mark.parametrize(
    ("row", "prompts", "num_images"),
    [
        (picture_row(3), ["#Number 3?"], 1),
        ({"texts": PAIRS, "images": [IMAGE, IMAGE]}, ["What?", "And?"], 2),
        ({"conversations": llava("<image>\nA?", "B.")["conversations"], "image": IMAGE}, ["#\nA?"], 1),
        ({"messages": chat("A <image>?", "B.")["messages"], "image": IMAGE["bytes"]}, ["A #?"], 1),
        ({"messages": json.dumps(chat("A?", "B.")["messages"]), "images": None}, ["A?"], 0),
        (
            {
                "messages": chat(
                    [{"type": "image", "index": 1}, {"type": "image", "index": 0}], [{"type": "text", "text": "B."}]
                )["messages"],
                "images": [IMAGE, {"bytes": b"", "path": None}],
            },
            ["##"],
            2,
        ),
        ({"messages": chat("<image>?", "B.")["messages"], "image": {"bytes": None, "path": "1.png"}}, ["#?"], 1),
    ],
)
def test_tables_as_hugging_face_datasets_store_them(
    root: Path, row: dict[str, Any], prompts: list[str], num_images: int
) -> None:
    write_parquet(root / "data/train.parquet", [row])
    source = opened(root, "parquet", "data")
    (found,) = source.items
    assert marked(found) == prompts and len(found.media) == num_images
    assert source.read_text is not None
    text = source.read_text(0)
    assert (text.turns, text.key, len(text.media)) == (found.turns, found.key, len(found.media))
    if prompts == ["##"]:
        assert found.images[0] == b"" and found.images[1] == IMAGE["bytes"]  # by their index
    assert source.locate(0) == f"{root}/data/train.parquet, row 0"


@pytest.mark.parametrize("format_", ["llava", "messages", "parquet"])
def test_keys_and_columns_may_have_other_names(root: Path, format_: str) -> None:
    talk = [{"who": "user", "says": "<image>?"}, {"who": "assistant", "says": "Yes."}]
    record = {"talk": talk, "pics": ["2.png"], "uid": 17, "id": "other", "images": ["0.png"]}
    columns = {"messages": "talk", "images": "pics", "id": "uid", "role": "who", "content": "says"}
    if format_ == "parquet":
        write_parquet(root / "chat.parquet", [record])
    else:
        write_jsonl(root / "chat.jsonl", [record])
    path = "chat.parquet" if format_ == "parquet" else "chat.jsonl"
    (found,) = opened(root, format_, path, columns=columns).items
    assert names(found) == ["2.png"] and found.turns[0].response == "Yes." and "/17." in found.key
    with pytest.raises(DataError, match=r"pix'? ?\(columns\.images\)|'pix'"):
        opened(root, format_, path, columns={**columns, "images": "pix"})
    if format_ != "parquet":
        with pytest.raises(DataError, match="no record has the key 'chats'"):
            opened(root, format_, path, columns={"messages": "chats"})
    else:
        with pytest.raises(DataError, match=r"has no column 'messages' or .*Name the one"):
            opened(root, format_, path)


@pytest.mark.parametrize("format_", ["llava", "llava array", "parquet"])
def test_each_turn_may_be_a_sample_of_its_own(root: Path, format_: str) -> None:
    records = [
        llava("<image>A", "a", "B", "b", "<image><image>C", "c", image=["0.png", "1.png", "2.png"]),
        llava("D", "d"),
        llava("E", "e", "F", "f", image="3.png"),
    ]
    if format_ == "llava":
        path = write_jsonl(root / "chat.jsonl", records)
    elif format_ == "llava array":
        path = root / "chat.json"
        path.write_text(json.dumps(records))
    else:
        rows = [
            {**record, "image": [{"bytes": None, "path": one} for one in _list(record.get("image"))]}
            for record in records
        ]
        path = write_parquet(root / "chat.parquet", rows, row_group_size=2)
    source = opened(root, format_.split()[0], path.name, split_turns=True)
    assert [turn.prompt for sample in source.items for turn in sample.turns] == ["A", "B", "C", "D", "E", "F"]
    assert [names(sample) for sample in source.items] == [
        ["0.png"], ["0.png"], ["1.png", "2.png"], [], ["3.png"], ["3.png"],
    ]  # fmt: skip
    assert [len(sample.turns[0].placeholders) for sample in source.items] == [1, 0, 2, 0, 0, 0]
    assert len({sample.key for sample in source.items}) == 6
    if format_ == "parquet":
        assert source.counts.tolist() == [4, 2]
    whole = opened(root, format_.split()[0], path.name)
    assert [len(sample.turns) for sample in whole.items] == [3, 1, 2]


def _list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def test_files_folders_and_patterns_in_their_order(root: Path) -> None:
    for number in range(3):
        write_jsonl(root / f"parts/part-{number}.jsonl", [llava(f"Q{number}{at}", "A") for at in range(2)])
    (root / "parts/readme.txt").write_text("no data")
    everything = [f"Q{number}{at}" for number in range(3) for at in range(2)]
    for path in ("parts", "parts/part-{0..2}.jsonl", [f"parts/part-{number}.jsonl" for number in range(3)]):
        items = opened(root, "llava", path).items
        assert [sample.turns[0].prompt for sample in items] == everything
        assert [sample.turns[0].prompt for sample in items[1:3]] == everything[1:3]
        assert items[-1].turns == items[5].turns and items[5].key == "mine/chat/part-2.2"
        with pytest.raises(IndexError):
            items[6]
    with pytest.raises(DataError, match=r"part-3\.jsonl \(data\.sources mine\)"):
        opened(root, "llava", "parts/part-{2..3}.jsonl")
    with pytest.raises(DataError, match="nowhere"):
        opened(root, "llava", "parts", images="nowhere")
    with pytest.raises(DataError, match=r"more than once"):
        opened(root, "llava", ["parts", "parts/part-1.jsonl"])
    with pytest.raises(DataError, match=r"holds no \.parquet or \.pq file"):
        opened(root, "parquet", "parts")


def test_own_prompts_are_rendered_as_they_are(root: Path, make_session_template: Template) -> None:
    write_jsonl(root / "chat.jsonl", [llava("What <image> is it?", "A cat.", "Why?", "So.", image="0.png")])
    (found,) = opened(root, "llava", "chat.jsonl").items
    text = "".join(part.text for part in make_session_template.conversation_parts(found))
    assert "\nWhat <image> is it?<|end|>" in text and "\nWhy?<|end|>" in text
    sample = make_session_template.render_conversation(found)
    assert sample is not None and sample.modality_ids.count(Modality.IMAGE) == 3
