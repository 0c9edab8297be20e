"""Each source reads its original files: wording, gold answers, boxes, grammar; what is broken is named."""

import json
import re
import shutil
from pathlib import Path
from typing import get_args

import pytest
from data_files import write_sources
from hypothesis import given
from hypothesis import strategies as st

from aki_megatron.config.data import SourceName
from aki_megatron.data.sources import FILES, SOURCES, open_sources, task_of
from aki_megatron.data.sources.aokvqa import lettered
from aki_megatron.data.sources.refcoco import box_text
from aki_megatron.data.sources.vsr import question
from aki_megatron.flow import ConfigError, Conversation, DataError


def test_every_source_a_config_may_name_exists() -> None:
    assert set(get_args(SourceName)) == set(SOURCES) == set(FILES)


def first(root: Path, name: str) -> Conversation:
    return open_sources(root, [name], "train")[name][0]


def test_vqav2(source_root: Path) -> None:
    sample = first(source_root, "vqav2")
    assert sample.turns[0].prompt == "Answer the question using a single word or phrase. How many cats 1?"
    assert sample.turns[0].response == "1"  # paired by question_id: the annotations are in reverse order
    assert sample.image == source_root / "VQA/train2014/COCO_train2014_000000000001.jpg"
    assert sample.key == "vqav2/what_color_is_the/10" and task_of(sample.key) == "vqav2/what_color_is_the"


def test_vsr(source_root: Path) -> None:
    rows = open_sources(source_root, ["vsr"], "train")["vsr"]
    assert [row.turns[0].response for row in rows[:2]] == ["yes", "no"]
    assert rows[0].turns[0].prompt == (
        "Answer the question using a single word or phrase. "
        "Is the fish 1 at the left side of the dish? Please answer yes or no."
    )
    assert rows[0].image == source_root / "A-OKVQA/train2017/000000000001.jpg"
    assert rows[1].image == source_root / "vsr/val2017/000000000002.jpg"
    assert task_of(rows[0].key) == "vsr/relation"


def test_aokvqa(source_root: Path) -> None:
    choices = ["bus", "cup", "tree", "clock"]
    for number, sample in enumerate(open_sources(source_root, ["aokvqa"], "train")["aokvqa"], start=1):
        prompt = sample.turns[0].prompt
        head = "Answer with the option's letter from the given choices directly. Which one is red?\nOptions:\n"
        assert prompt.startswith(head) and prompt.endswith("\n")
        lines = prompt.removeprefix(head).removesuffix("\n").split("\n")
        assert [line[:3] for line in lines] == ["A. ", "B. ", "C. ", "D. "]
        assert sorted(line[3:] for line in lines) == sorted(choices)
        assert f"{sample.turns[0].response}. {choices[number % 4]}" in lines
        assert sample.key == f"aokvqa/choice/q{number}"
        assert sample.image == source_root / f"A-OKVQA/train2017/{number:012d}.jpg"


def test_refcoco(source_root: Path) -> None:
    sample = first(source_root, "refcoco")
    assert sample.turns[0].prompt == (
        "Provide a short description for this region. <bbox>[0.100, 0.100][0.350, 1.000]</bbox>"
    )
    assert sample.turns[0].response == "red cat 1"
    assert sample.image == source_root / "VQA/train2014/COCO_train2014_000000000001.jpg"
    assert task_of(sample.key) == "refcoco/region"


@given(
    choices=st.lists(st.text(max_size=5), min_size=1, max_size=26, unique=True),
    key=st.text(max_size=8),
    data=st.data(),
)
def test_gold_letter_survives_the_shuffle(choices: list[str], key: str, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, len(choices) - 1))
    before = list(choices)
    for _ in range(3):  # the second visit is where the official code goes wrong
        options, letter = lettered(choices, correct, key)
        by_letter = re.findall(r"(?:^|\n)([A-Z])\. ", options)
        assert f"{letter}. {choices[correct]}" in options and letter in by_letter
        assert lettered(choices, correct, key) == (options, letter)
    assert choices == before


def test_every_position_of_the_gold_letter_occurs() -> None:
    letters = [lettered(["a", "b", "c", "d"], 0, f"key {number}")[1] for number in range(400)]
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")


@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    box=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_boxes_lie_in_the_picture(width: int, height: int, box: tuple[float, float, float, float]) -> None:
    x, y, w, h = box
    text = box_text([x * width, y * height, w * width, h * height], width, height)  # may stick out on the right
    found = re.fullmatch(r"<bbox>\[(\d\.\d{3}), (\d\.\d{3})\]\[(\d\.\d{3}), (\d\.\d{3})\]</bbox>", text)
    assert found is not None
    x1, y1, x2, y2 = map(float, found.groups())
    assert 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1
    assert abs(x1 - x) <= 0.0006 and abs(y1 - y) <= 0.0006


@pytest.mark.parametrize(
    ("statement", "asked"),
    [
        ("The cat is beside the dog.", "Is the cat beside the dog?"),
        (
            "The fish is at the left side of the dish.",
            "Is the fish at the left side of the dish?",
        ),
        ("The dogs are under the island .", "Are the dogs under the island?"),
        ("A TV is facing away from the person", "Is a TV facing away from the person?"),
        ("Paris is left of this.", "Is Paris left of this?"),
        (
            "The bus contains the island.",
            "Is it true that the bus contains the island?",
        ),
        (
            "The dog that is brown is left of it.",
            "Is it true that the dog that is brown is left of it?",
        ),
        (
            "Is the cat there",
            "Is it true that Is the cat there?",
        ),  # no subject before the verb
        (
            "The cat is",
            "Is it true that the cat is?",
        ),
    ],
)
def test_vsr_question_by_grammar(statement: str, asked: str) -> None:
    assert question(statement) == asked


NOUN = st.sampled_from(["cat", "fish", "dish", "island", "iris", "tennis racket", "area rug", "software", "bus"])


@given(subject=NOUN, other=NOUN, relation=st.sampled_from(["left of", "at the side of", "parallel to", "this side of"]))
def test_vsr_question_keeps_every_word(subject: str, other: str, relation: str) -> None:
    assert question(f"The {subject} is {relation} the {other}.") == f"Is the {subject} {relation} the {other}?"


def test_everything_missing_is_listed_at_once(tmp_path: Path) -> None:
    write_sources(tmp_path, count=2)
    gone = ["VQA/v2_mscoco_train2014_annotations.json", "vsr/train-random.jsonl", "A-OKVQA/train2017"]
    for name in gone:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError) as caught:
        open_sources(tmp_path, list(SOURCES), "train")
    for name in gone:
        assert str(tmp_path / name) in str(caught.value)
    assert "(vqav2)" in str(caught.value) and "(aokvqa)" in str(caught.value)
    with pytest.raises(DataError, match="dev-random"):
        open_sources(tmp_path, ["vsr"], "val")
    with pytest.raises(DataError, match=r"data root .*nowhere \(data\.root\) does not exist"):
        open_sources(tmp_path / "nowhere", ["vsr"], "train")
    with pytest.raises(ConfigError, match="known are"):
        open_sources(tmp_path, ["coco"], "train")


def edit(root: Path, name: str, change) -> None:
    content = json.loads((root / name).read_text())
    change(content)
    (root / name).write_text(json.dumps(content))


def test_unpaired_vqav2_files(tmp_path: Path) -> None:
    write_sources(tmp_path, count=3)
    edit(tmp_path, FILES["vqav2"]["train"][1], lambda content: content["annotations"].pop())
    with pytest.raises(DataError, match=r"1 questions without an annotation \(question_id \[10\]\)"):
        open_sources(tmp_path, ["vqav2"], "train")


def test_malformed_rows_name_file_and_row(tmp_path: Path) -> None:
    write_sources(tmp_path, count=3)
    edit(tmp_path, FILES["aokvqa"]["train"][0], lambda content: content[1].update(correct_choice_idx=9))
    with pytest.raises(DataError, match=r"aokvqa_v1p0_train\.json: question_id q2: correct_choice_idx=9 of 4 choices"):
        open_sources(tmp_path, ["aokvqa"], "train")
    edit(tmp_path, FILES["refcoco"]["train"][0], lambda content: content["images"][0].pop("caption"))
    with pytest.raises(DataError, match=r"finetune_refcoco_train\.json: the field 'caption' is missing"):
        open_sources(tmp_path, ["refcoco"], "train")
    edit(tmp_path, FILES["refcoco"]["train"][0], lambda content: content["annotations"].reverse())
    with pytest.raises(DataError, match="images entry 1 stands beside an annotation of image_id 3"):
        open_sources(tmp_path, ["refcoco"], "train")
    (tmp_path / FILES["vqav2"]["train"][0]).write_text("{ not json")
    with pytest.raises(DataError, match=r"questions\.json is not valid JSON"):
        open_sources(tmp_path, ["vqav2"], "train")


def test_bad_vsr_line_is_an_error_of_that_line(tmp_path: Path) -> None:
    write_sources(tmp_path, count=3)
    file = tmp_path / "vsr/train-random.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = lines[1][:20]
    file.write_text("\n".join(lines))
    rows = open_sources(tmp_path, ["vsr"], "train")["vsr"]
    assert len(rows) == 3 and rows[2].turns[0].response == "yes"
    with pytest.raises(DataError, match=r"train-random\.jsonl, line 2"):
        rows[1]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/../../x.jpg", "C:/x.jpg", "..\\x.jpg"])
def test_file_names_cannot_leave_the_root(tmp_path: Path, name: str) -> None:
    write_sources(tmp_path, count=2)
    edit(tmp_path, FILES["refcoco"]["train"][0], lambda content: content["images"][0].update(file_name=name))
    rows = open_sources(tmp_path, ["refcoco"], "train")["refcoco"]
    with pytest.raises(DataError, match=r"Sample refcoco/region/1: the file name .* leads out of the data root"):
        rows[0]
