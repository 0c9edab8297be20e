"""Annotation files and folders as they are met outside of their release: what is left out, what is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_files import image_bytes, write_sources
from source_files import ISBNS, put, write_more_sources

from aki_megatron.config.load import load_run
from aki_megatron.data.bad_samples import BadSample, BadSampleBudget, BadSampleBudgetExceeded
from aki_megatron.data.fault_kinds import FaultCounts, fault_kind
from aki_megatron.data.pipeline import build_sources
from aki_megatron.data.sources import dataset_reader, missing_files, open_sources
from aki_megatron.data.sources.records import LazyConversations
from aki_megatron.errors import DataError

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"
QUESTIONS, ANNOTATIONS = dataset_reader("vqav2").files["train"][:2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_sources(tmp_path, count=3)
    write_more_sources(tmp_path)
    return tmp_path


def tolerant(root: Path, name: str) -> LazyConversations[Any]:
    return open_sources(root, [name], "train", max_bad_fraction=0.001)[name]


def edit(root: Path, name: str, change: Callable[[Any], object]) -> None:
    content = json.loads((root / name).read_text())
    change(content)
    (root / name).write_text(json.dumps(content))


def vsr_line(caption: str = "The cat is on the mat.", **fields: object) -> str:
    link = "http://images.example/train2017/000000000001.jpg"
    return json.dumps({"image_link": link, "caption": caption, "label": 1, **fields}, ensure_ascii=False)


def test_vsr_is_split_at_newlines_only(root: Path) -> None:
    separators = "\u2028\u2029\x85\x0b\x0c\x1c"
    lines = [vsr_line(f"The cat is on{mark}the mat.").replace("\\u000b", "") for mark in separators]
    put(root, "vsr/train-random.jsonl", "\r\n".join([*lines, "", vsr_line("The end is near it.")]).encode())
    samples = tolerant(root, "vsr")
    numbers = [int(sample.key.rpartition("/")[2]) for sample in samples]
    assert numbers[0] == 1 and numbers[-1] == len(separators) + 2
    assert "\u2028" in samples[0].turns[0].prompt
    assert all("line 2" not in line for line in samples.faults.lines())


def test_a_byte_order_mark_is_no_part_of_a_line_or_a_text(root: Path) -> None:
    marked = [f"\ufeff{vsr_line('The cat is on it.')}", vsr_line("\ufeffThe cat is on it.")]
    put(root, "vsr/train-random.jsonl", "\n".join(marked).encode())
    samples = tolerant(root, "vsr")
    assert not samples.faults.total
    assert samples[0].turns == samples[1].turns and samples[0].turns[0].prompt.find("Is the cat on it?") > 0


def test_a_line_that_is_not_utf_8_is_left_out(root: Path) -> None:
    put(root, "vsr/train-random.jsonl", vsr_line().encode() + b"\n\xff\xfe{}\n" + vsr_line().encode())
    samples = tolerant(root, "vsr")
    assert [sample.key for sample in samples] == ["vsr/relation/1", "vsr/relation/3"]
    assert "line 2: 'utf-8' codec can't decode" in samples.faults.lines()[0]


REGIONS: list[tuple[dict[str, float], str | None]] = [
    ({"x": 700, "y": 500, "width": 400, "height": 400}, "[0.875, 0.833][1.000, 1.000]"),
    ({"x": -10, "y": -10, "width": 90, "height": 70}, "[0.000, 0.000][0.100, 0.100]"),
    ({"x": 181, "y": -871, "width": 25, "height": 24}, None),
    ({"x": 800, "y": 10, "width": 25, "height": 24}, None),
    ({"x": 10, "y": 10, "width": -5, "height": -8}, None),
    ({"x": 10, "y": 10, "width": 0, "height": 8}, None),
    ({"x": 10.0, "y": 10.0, "width": 0.1, "height": 8}, None),
    ({"x": 400, "y": 300, "width": 1, "height": 1}, "[0.500, 0.500][0.501, 0.502]"),
]  # of an image of 800 x 600


@pytest.mark.parametrize(("box", "text"), REGIONS)
def test_boxes_are_clipped_or_left_out(root: Path, box: dict[str, float], text: str | None) -> None:
    edit(root, "VisualGenome/region_descriptions.json", lambda c: c[0]["regions"][0].update(box))
    samples = tolerant(root, "visualgenome")
    assert samples.faults.total == (text is None)
    assert (text in samples[0].turns[0].prompt) if text else samples[0].key == "visualgenome/region/1383"
    xywh = [box["x"] * 640 / 800, box["y"] * 480 / 600, box["width"] * 640 / 800, box["height"] * 480 / 600]
    refcoco = "ref/annotations/finetune_refcocog_train.json"
    edit(root, refcoco, lambda c: c["images"][0].update(width=640, height=480))
    edit(root, refcoco, lambda c: c["annotations"][0].update(bbox=xywh))
    phrases = tolerant(root, "refcocog")
    assert phrases.faults.total == (text is None) and (text is None or text in phrases[0].turns[0].prompt)


def test_faults_of_boxes_are_counted_by_kind(root: Path) -> None:
    boxes = [box for box, text in REGIONS if text is None]

    def change(content: Any) -> None:
        region = content[0]["regions"][0]
        content[0]["regions"] += [{**region, **box, "region_id": 9000 + n} for n, box in enumerate(boxes)]

    edit(root, "VisualGenome/region_descriptions.json", change)
    faults = tolerant(root, "visualgenome").faults
    assert sorted(faults.counts.values()) == [1, 2, 2]  # negative; outside; empty
    assert any("is outside of the 800 x 600 image" in line and line.startswith("2 x ") for line in faults.lines())


def test_two_annotations_of_one_question_are_never_mixed(root: Path) -> None:
    def repeat(content: Any, **changes: object) -> None:
        content["annotations"].append({**content["annotations"][0], **changes})

    edit(root, ANNOTATIONS, repeat)
    assert len(tolerant(root, "vqav2")) == 3 and not tolerant(root, "vqav2").faults.total  # the same twice
    edit(root, ANNOTATIONS, lambda c: repeat(c, multiple_choice_answer="OTHER"))
    samples = tolerant(root, "vqav2")
    assert [sample.key.rpartition("/")[2] for sample in samples] == ["10", "20"]
    assert "(question_id 30): two annotations of one question_id differ: '3' and 'OTHER'" in samples.faults.lines()[0]
    with pytest.raises(DataError, match="question_id 30"):
        open_sources(root, ["vqav2"], "train")


def test_questions_and_annotations_that_do_not_belong_together_are_left_out(root: Path) -> None:
    edit(root, ANNOTATIONS, lambda c: c["annotations"][0].update(image_id=1))
    edit(root, QUESTIONS, lambda c: c["questions"].append({**c["questions"][0], "question": "Which other?"}))
    samples = tolerant(root, "vqav2")
    assert [sample.key.rpartition("/")[2] for sample in samples] == ["20"] and samples.faults.total == 3
    messages = "\n".join(samples.faults.lines())
    assert "the question is about image 3, its annotation about image 1" in messages
    assert "another question has this question_id" in messages


def test_a_malformed_annotation_is_one_fault(root: Path) -> None:
    edit(root, ANNOTATIONS, lambda c: c["annotations"][0].pop("multiple_choice_answer"))
    samples = tolerant(root, "vqav2")
    assert len(samples) == 2 and samples.faults.total == 1


def test_two_sizes_of_one_image_are_never_mixed(root: Path) -> None:
    edit(root, "VisualGenome/image_data.json", lambda c: c.append({**c[0], "width": 1}))
    samples = tolerant(root, "visualgenome")
    assert [sample.key for sample in samples] == ["visualgenome/region/4092"] and samples.faults.total == 2
    assert "image_data.json gives two sizes of image 1" in samples.faults.lines()[0]


def test_one_malformed_part_of_an_entry_leaves_the_others(root: Path) -> None:
    edit(root, "OCRVQA/dataset.json", lambda c: c[ISBNS[0]]["answers"].__setitem__(0, None))
    samples = tolerant(root, "ocrvqa")
    assert [sample.key for sample in samples] == [f"ocrvqa/cover/{ISBNS[0]}.1"]
    assert f"entry '{ISBNS[0]}', questions[0]: answers must be text, got None" in samples.faults.lines()[0]


@pytest.mark.parametrize("suffix", [".png", ".gif", ".jpeg"])
def test_a_cover_is_found_under_another_suffix(root: Path, suffix: str) -> None:
    image = root / f"OCRVQA/images/{ISBNS[0]}.jpg"
    assert tolerant(root, "ocrvqa")[0].images[0] == image
    image.rename(image.with_suffix(suffix))
    assert tolerant(root, "ocrvqa")[0].images[0] == image.with_suffix(suffix)
    image.with_suffix(suffix).unlink()
    assert tolerant(root, "ocrvqa")[0].images[0] == image


@pytest.mark.parametrize("parent", ["VisualGenome", "VisualGenome/images"])
def test_visual_genome_in_the_two_folders_of_its_release(root: Path, parent: str) -> None:
    images = root / "VisualGenome/images"
    files = {int(path.stem): path.read_bytes() for path in images.iterdir()}
    shutil.rmtree(images)
    for number, folder in ((1, "VG_100K"), (2, "VG_100K_2")):
        put(root, f"{parent}/{folder}/{number}.jpg", files[number])
    samples = tolerant(root, "visualgenome")
    assert {sample.images[0] for sample in samples} == {
        root / parent / "VG_100K/1.jpg",
        root / parent / "VG_100K_2/2.jpg",
    }
    folders = [f"{parent}/VG_100K", f"{parent}/VG_100K_2"]
    assert list(dataset_reader("visualgenome").files_below(root, "train")[2:]) == folders
    shutil.rmtree(root / folders[1])
    assert missing_files(root, ["visualgenome"], "train") == [f"{root / folders[1]} (visualgenome)"]


def test_images_in_one_folder_stay_there(root: Path) -> None:
    put(root, "VisualGenome/VG_100K/9.jpg", image_bytes(9))
    assert dataset_reader("visualgenome").files_below(root, "train")[2:] == ("VisualGenome/images",)


def test_a_text_only_science_qa_needs_no_images(root: Path) -> None:
    shutil.rmtree(root / "ScienceQA/images")
    assert "ScienceQA/images/train" in missing_files(root, ["scienceqa"], "train")[0]
    edit(root, "ScienceQA/problems.json", lambda c: [entry.update(image=None) for entry in c.values()])
    assert not missing_files(root, ["scienceqa"], "train")
    assert all(not sample.images for sample in tolerant(root, "scienceqa"))
    assert dataset_reader("scienceqa").files_below(root, "train") == ("ScienceQA/problems.json",)


def write_gqa_of(root: Path, count: int, bad: int) -> None:
    question = {"question": "What?", "imageId": "1", "answer": "x", "types": {}}
    entries = {str(n): question if n >= bad else {"imageId": "1"} for n in range(count)}
    put(root, "GQA/train_balanced_questions.json", entries)


@pytest.mark.parametrize(
    ("count", "bad", "fraction", "allowed"),
    [(20, 8, 0.001, True), (20, 9, 0.001, False), (1000, 10, 0.01, True), (1000, 11, 0.01, False), (20, 1, 0.0, False)],
)
def test_as_many_malformed_records_as_pictures_are_tolerated(
    root: Path, count: int, bad: int, fraction: float, allowed: bool
) -> None:
    write_gqa_of(root, count, bad)
    lines: list[str] = []
    if allowed:
        opened = open_sources(root, ["gqa"], "train", max_bad_fraction=fraction, progress=lines.append)["gqa"]
        assert len(opened) == count - bad and opened[0].key == f"gqa/vqa/{bad}"
        assert f"source gqa: {bad} of {count:,} records cannot be used" in lines[0] and f"{bad} x " in lines[0]
        return
    with pytest.raises(
        DataError, match=rf"{bad} of .* records cannot be used.*(\n.*)*data\.max_bad_fraction={fraction}"
    ):
        open_sources(root, ["gqa"], "train", max_bad_fraction=fraction, progress=lines.append)
    assert not lines


def test_a_source_of_malformed_records_only_says_what_is_wrong(root: Path) -> None:
    write_gqa_of(root, 3, 3)
    with pytest.raises(DataError, match=r"\['gqa'\] .* no sample in split 'train'\.\n  3 x .*'question' is missing"):
        tolerant(root, "gqa")


def test_a_run_says_at_its_start_what_is_left_out(root: Path) -> None:
    write_gqa_of(root, 20, 2)
    flags = ["--data.root", str(root), "--data.sources", "[{name: gqa}, {name: vsr}]"]
    config = load_run(flags, default_config=SFT, prog="", description="")
    lines: list[str] = []
    sources = build_sources(config.data, lines.append)
    assert len(sources["gqa"].items) == 18 and len(lines) == 1 and "2 x " in lines[0]


def test_one_file_that_is_met_again_is_listed_once() -> None:
    budget = BadSampleBudget(0.001)
    with pytest.raises(BadSampleBudgetExceeded) as caught:
        for _ in range(5):
            budget.record(0, [BadSample("a", "image x.jpg is missing"), BadSample("a", "image y.jpg is missing")])
    assert str(caught.value).count("x.jpg") == str(caught.value).count("y.jpg") == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("image /a/b.jpg of sample x/y/1 is torn", "image /c/d.jpg of sample x/y/2 is torn"),
        ("Tar /a/0.tar, key 12: the text is not UTF-8: byte 3", "Tar /a/1.tar, key x y: the text is not UTF-8: byte 4"),
        ("choice=9 of 4 choices", "choice=-1 of 5 choices"),
        ("must be text, got [None, 3]", "must be text, got ['x']"),
        ("cannot identify <_io.BytesIO object at 0x7f>", "cannot identify <_io.BytesIO object at 0x81>"),
        ("the box [1, 2.5, -3, 4]: bad", "the box [10, 1e+30, nan, 4]: bad"),
    ],
)
def test_messages_of_one_kind(one: str, other: str) -> None:
    assert fault_kind(one) == fault_kind(other) != fault_kind("the field 'question' is missing")


def test_kinds_of_different_fields_differ() -> None:
    assert fault_kind("the field 'question' is missing") != fault_kind("the field 'answer' is missing")


def test_fault_counts_of_parts_are_added_in_order() -> None:
    first, second = FaultCounts(), FaultCounts()
    first.add("file 1", "a is bad")
    for number in range(6):
        second.add("file 2", f"{chr(98 + number)} is bad")
    second.add("file 2", "a is bad")
    first.update(second)
    assert first.total == 8 and first.lines(1) == ["2 x file 1: a is bad", "6 of 6 other kinds"]
