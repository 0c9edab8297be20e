"""Each dataset is read from its original files: wording, reference answers, boxes, grammar."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from source_files import put, write_gqa, write_llava, write_more_sources, write_ocrvqa, write_scienceqa

from aki_megatron.config.datasets import DATASETS
from aki_megatron.data.sources import SPLITS, dataset_reader, open_sources, task_of, with_split
from aki_megatron.data.sources.boxes import box_text
from aki_megatron.data.sources.options import letter_options
from aki_megatron.data.sources.records import DatasetReader
from aki_megatron.data.sources.vsr import to_question
from aki_megatron.errors import ConfigError
from aki_megatron.types import Conversation


@pytest.mark.parametrize("name", DATASETS)
def test_every_registered_dataset_has_a_reader(name: str) -> None:
    reader = dataset_reader(name)
    assert isinstance(reader, DatasetReader)
    assert "train" in reader.files and set(reader.files) <= set(SPLITS)


def test_a_dataset_that_is_not_registered_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Unknown data.sources \['coco'\]; known are"):
        dataset_reader("coco")


def first(root: Path, name: str) -> Conversation:
    return open_sources(root, [name], "train")[name][0]


def test_vqav2(source_root: Path) -> None:
    sample = first(source_root, "vqav2")
    assert sample.turns[0].prompt == "Answer the question using a single word or phrase. How many cats 1?"
    assert sample.turns[0].response == "1"  # paired by question_id: the annotations are in reverse order
    assert sample.images[0] == source_root / "VQA/train2014/COCO_train2014_000000000001.jpg"
    assert sample.key == "vqav2/what_color_is_the/10" and task_of(sample.key) == "vqav2/what_color_is_the"


def test_vsr(source_root: Path) -> None:
    samples = open_sources(source_root, ["vsr"], "train")["vsr"]
    assert [sample.turns[0].response for sample in samples[:2]] == ["yes", "no"]
    assert samples[0].turns[0].prompt == (
        "Answer the question using a single word or phrase. "
        "Is the fish 1 at the left side of the dish? Please answer yes or no."
    )
    assert samples[0].images[0] == source_root / "A-OKVQA/train2017/000000000001.jpg"
    assert samples[1].images[0] == source_root / "vsr/val2017/000000000002.jpg"
    assert task_of(samples[0].key) == "vsr/relation"


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
        assert sample.images[0] == source_root / f"A-OKVQA/train2017/{number:012d}.jpg"


def test_refcoco(source_root: Path) -> None:
    sample = first(source_root, "refcoco")
    assert sample.turns[0].prompt == (
        "Provide a short description for this region. <bbox>[0.100, 0.100][0.350, 1.000]</bbox>"
    )
    assert sample.turns[0].response == "red cat 1"
    assert sample.images[0] == source_root / "VQA/train2014/COCO_train2014_000000000001.jpg"
    assert task_of(sample.key) == "refcoco/region"


@given(
    choices=st.lists(st.text(max_size=5), min_size=1, max_size=26, unique=True),
    key=st.text(max_size=8),
    data=st.data(),
)
def test_the_answer_letter_survives_the_shuffle(choices: list[str], key: str, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, len(choices) - 1))
    before = list(choices)
    for _ in range(3):  # the second access is where the official code goes wrong
        options, letter = letter_options(choices, correct, key)
        by_letter = re.findall(r"(?:^|\n)([A-Z])\. ", options)
        assert f"{letter}. {choices[correct]}" in options and letter in by_letter
        assert letter_options(choices, correct, key) == (options, letter)
    assert choices == before


def test_every_answer_letter_occurs() -> None:
    letters = [letter_options(["a", "b", "c", "d"], 0, f"key {number}")[1] for number in range(400)]
    assert all(70 < letters.count(letter) < 130 for letter in "ABCD")


@given(
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    corner=st.tuples(*[st.floats(0, 0.99)] * 2),
    size=st.tuples(*[st.floats(0.01, 1)] * 2),
)
def test_boxes_are_clipped_to_the_image(
    width: int, height: int, corner: tuple[float, float], size: tuple[float, float]
) -> None:
    (x, y), (w, h) = corner, size
    text = box_text([x * width, y * height, w * width, h * height], width, height)  # may stick out on the right
    found = re.fullmatch(r"<bbox>\[(\d\.\d{3}), (\d\.\d{3})\]\[(\d\.\d{3}), (\d\.\d{3})\]</bbox>", text)
    assert found is not None
    x1, y1, x2, y2 = map(float, found.groups())
    assert 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1
    assert abs(x1 - x) <= 0.0006 and abs(y1 - y) <= 0.0006


@pytest.mark.parametrize(
    ("statement", "expected"),
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
def test_vsr_question_by_grammar(statement: str, expected: str) -> None:
    assert to_question(statement) == expected


NOUN = st.sampled_from(["cat", "fish", "dish", "island", "iris", "tennis racket", "area rug", "software", "bus"])


@given(subject=NOUN, other=NOUN, relation=st.sampled_from(["left of", "at the side of", "parallel to", "this side of"]))
def test_vsr_question_keeps_every_word(subject: str, other: str, relation: str) -> None:
    assert to_question(f"The {subject} is {relation} the {other}.") == f"Is the {subject} {relation} the {other}?"


def test_vsr_statements_with_is_inside_a_word_keep_it() -> None:
    """The release splits at the letters "is" and asks "Is the f h at the left side of the d h?"."""
    for statement in ("The fish is at the left side of the dish.", "This island is behind the iris."):
        asked = to_question(statement)
        assert sorted(re.findall(r"\w+", asked.lower())) == sorted(re.findall(r"\w+", statement.lower()))
        assert asked.startswith("Is th") and asked.endswith("?") and "f h" not in asked


def test_scienceqa_with_and_without_an_image(tmp_path: Path) -> None:
    write_scienceqa(tmp_path)
    with_image, text_only = open_sources(tmp_path, ["scienceqa"], "train")["scienceqa"]
    assert (task_of(with_image.key), task_of(text_only.key)) == ("scienceqa/image", "scienceqa/text")
    assert with_image.images[0] == tmp_path / "ScienceQA/images/train/1/image.png" and not text_only.images
    assert "\nContext: N/A\nOptions:\n" in with_image.turns[0].prompt and with_image.turns[0].prompt.endswith("\n")
    assert "\nContext: Two of the words rhyme.\nOptions:\n" in text_only.turns[0].prompt
    assert f"\n{with_image.turns[0].response}. West Virginia\n" in with_image.turns[0].prompt
    assert f"\n{text_only.turns[0].response}. hot\n" in text_only.turns[0].prompt


def test_gqa_takes_the_short_answer(tmp_path: Path) -> None:
    write_gqa(tmp_path)
    samples = open_sources(tmp_path, ["gqa"], "train")["gqa"]
    assert [(sample.key, sample.turns[0].response) for sample in samples] == [
        ("gqa/verify/02930152", "yes"),
        ("gqa/vqa/07333408", "pipe"),
    ]
    assert samples[1].images[0] == tmp_path / "GQA/images/n161313.jpg"


def test_ocrvqa_splits_by_number_and_gives_a_sample_per_question(tmp_path: Path) -> None:
    write_ocrvqa(tmp_path)
    for split, cover, extension in (("train", "0761183272", "jpg"), ("val", "1400031354", "gif")):
        samples = open_sources(tmp_path, ["ocrvqa"], split)["ocrvqa"]
        assert [sample.key for sample in samples] == [f"ocrvqa/cover/{cover}.{number}" for number in range(2)]
        assert [sample.turns[0].response for sample in samples] == ["Sandra Boynton", "Yes"]
        assert {sample.images[0] for sample in samples} == {tmp_path / f"OCRVQA/images/{cover}.{extension}"}


@pytest.mark.parametrize("variant", ["refcoco+", "refcocog"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_refcoco_variants_read_their_own_files(tmp_path: Path, variant: str, split: str) -> None:
    write_more_sources(tmp_path)
    assert dataset_reader(variant).files[split][0] == f"ref/annotations/finetune_{variant}_{split}.json"
    samples = open_sources(tmp_path, [variant], split)[variant]
    assert [sample.key for sample in samples] == [f"{variant}/region/0", f"{variant}/region/1"]
    assert samples[0].images[0] == tmp_path / "VQA/train2014/COCO_train2014_000000000001.jpg"


def test_visualgenome_clips_boxes_to_the_image(tmp_path: Path) -> None:
    write_more_sources(tmp_path)
    samples = open_sources(tmp_path, ["visualgenome"], "train")["visualgenome"]
    assert [sample.turns[0].response for sample in samples] == [
        "the clock is green in colour",
        "a grey road",
        "black backpack",
    ]
    assert samples[1].turns[0].prompt.endswith("region. <bbox>[0.000, 0.620][1.000, 1.000]</bbox>")
    assert samples[2].images[0] == tmp_path / "VisualGenome/images/2.jpg"


def test_llava_single_turns_or_whole_conversations(tmp_path: Path) -> None:
    write_llava(tmp_path)
    single = open_sources(tmp_path, ["llava150k"], "train")["llava150k"]
    multi = open_sources(tmp_path, ["llava150k"], "train", multi_turn={"llava150k"})["llava150k"]
    assert [len(sample.turns) for sample in single] == [1, 1, 1] and [len(sample.turns) for sample in multi] == [2, 1]
    assert [turn for sample in single for turn in sample.turns] == [turn for sample in multi for turn in sample.turns]
    prompts = [sample.turns[0].prompt for sample in single]
    assert prompts[0] == "What are the colors of the bus in the image?" and prompts[2] == "Describe the picture."
    assert len({sample.key for sample in single}) == 3  # ids repeat in the release, keys do not
    assert {sample.images[0] for sample in (*single, *multi)} == {tmp_path / "A-OKVQA/train2017/000000033471.jpg"}
    with pytest.raises(ConfigError, match=r"\['vqav2'\] have no conversations of several turns"):
        open_sources(tmp_path, ["llava150k"], "train", multi_turn=["vqav2"])


def test_datasets_without_splits_have_no_val(tmp_path: Path) -> None:
    write_more_sources(tmp_path)
    with pytest.raises(ConfigError, match=r"\['visualgenome', 'llava150k'\] have no split 'val'"):
        open_sources(tmp_path, ["gqa", "visualgenome", "llava150k"], "val")
    assert set(DATASETS) - set(with_split(DATASETS, "val")) == {"visualgenome", "llava150k"}
    assert with_split(DATASETS, "train") == list(DATASETS)
    assert with_split(["llava150k", "gqa"], "val") == ["gqa"]


@given(
    choices=st.lists(st.text("abcXYZ ", min_size=1, max_size=4), min_size=2, max_size=5, unique=True),
    data=st.data(),
)
def test_answer_letters_of_scienceqa_hold_on_every_access(
    tmp_path_factory: pytest.TempPathFactory, choices: list[str], data: st.DataObject
) -> None:
    correct = data.draw(st.integers(0, len(choices) - 1))
    root = tmp_path_factory.mktemp("science")
    record = {"question": "Which?", "choices": choices, "answer": correct, "hint": "", "image": None, "split": "train"}
    put(root, "ScienceQA/problems.json", {str(number): record for number in range(3)})
    put(root, "ScienceQA/images/train/keep", b"")
    samples = open_sources(root, ["scienceqa"], "train")["scienceqa"]
    for index in (0, 1, 2, 1, 0):
        turn = samples[index].turns[0]
        options = turn.prompt.partition("Options:\n")[2].removesuffix("\n").split("\n")
        assert dict(zip("ABCDE", options, strict=False))[turn.response] == f"{turn.response}. {choices[correct]}"
        assert sorted(option[3:] for option in options) == sorted(choices)
