"""Errors name what is broken or missing in a dataset: the file, the entry, the key."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_files import write_sources
from source_files import put, write_more_sources

from aki_megatron.config.datasets import DATASETS
from aki_megatron.data.sources import dataset_reader, open_sources
from aki_megatron.errors import ConfigError, DataError

Change = Callable[[Any], object]


def train_files(name: str) -> tuple[str, ...]:
    return dataset_reader(name).files["train"]


def edit(root: Path, name: str, change: Change) -> None:
    content = json.loads((root / name).read_text())
    change(content)
    (root / name).write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_sources(tmp_path, count=3)
    write_more_sources(tmp_path)
    return tmp_path


def test_everything_missing_is_listed_at_once(root: Path) -> None:
    gone = ["VQA/v2_mscoco_train2014_annotations.json", "vsr/train-random.jsonl", "A-OKVQA/train2017"]
    gone += ["VisualGenome/image_data.json", "llava/llava_instruct_150k.json", "ScienceQA/images/train"]
    for name in gone:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError) as caught:
        open_sources(root, list(DATASETS), "train")
    for name in gone:
        assert str(root / name) in str(caught.value)
    assert "(vqav2)" in str(caught.value) and "(aokvqa)" in str(caught.value) and "(llava150k)" in str(caught.value)
    with pytest.raises(DataError, match="dev-random"):
        open_sources(root, ["vsr"], "val")
    with pytest.raises(ConfigError, match="known are"):
        open_sources(root, ["coco"], "train")
    with pytest.raises(ConfigError, match="Unknown split 'test'"):
        open_sources(root, ["vsr"], "test")


def test_a_missing_root_lists_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data root .*nowhere \(data\.root\) does not exist") as caught:
        open_sources(tmp_path / "nowhere", list(DATASETS), "train")
    for name in DATASETS:
        for file in train_files(name):
            assert f"{tmp_path / 'nowhere' / file} ({name})" in str(caught.value)


def test_unpaired_vqav2_files(root: Path) -> None:
    edit(root, train_files("vqav2")[1], lambda content: content["annotations"].pop())
    with pytest.raises(DataError, match=r"1 x .*questions\[0\] \(question_id 10\): the question has no annotation"):
        open_sources(root, ["vqav2"], "train")
    edit(root, train_files("vqav2")[0], lambda content: content["questions"].pop(0))
    edit(root, train_files("vqav2")[0], lambda content: content["questions"].pop(0))
    with pytest.raises(DataError, match=r"1 x .*annotations\.json \(question_id 20\): .*questions\.json has no such"):
        open_sources(root, ["vqav2"], "train")


MALFORMED: list[tuple[str, int, Change, str]] = [
    ("vqav2", 0, lambda c: c["questions"][1].pop("question"),
     r"questions\.json, questions\[1\] \(question_id 20\): the field 'question' is missing"),
    ("vqav2", 1, lambda c: c["annotations"][0].update(multiple_choice_answer=None),
     r"annotations\.json, annotations\[0\] \(question_id 30\): multiple_choice_answer must be text, got None"),
    ("vqav2", 0, lambda c: c.pop("questions"), r"questions\.json: the field 'questions' is missing"),
    ("gqa", 0, lambda c: c["07333408"].pop("imageId"),
     r"train_balanced_questions\.json, entry '07333408': the field 'imageId' is missing"),
    ("ocrvqa", 0, lambda c: c["0761183272"]["answers"].pop(),
     r"dataset\.json, entry '0761183272': questions and answers must be two lists of one length"),
    ("ocrvqa", 0, lambda c: c["0761183272"].pop("imageURL"), r"entry '0761183272': the field 'imageURL' is missing"),
    ("aokvqa", 0, lambda c: c[1].update(correct_choice_idx=9),
     r"aokvqa_v1p0_train\.json, entry 1 \(question_id q2\): correct_choice_idx=9 of 4 choices"),
    ("scienceqa", 0, lambda c: c["2"].update(answer=-1), r"problems\.json, entry '2': answer=-1 of 3 choices"),
    ("scienceqa", 0, lambda c: c["2"].update(choices=None), "entry '2': choices must be a list, got None"),
    ("refcoco", 0, lambda c: c["images"][0].pop("caption"),
     r"finetune_refcoco_train\.json, images\[0\] \(id 1\): the field 'caption' is missing"),
    ("refcoco", 0, lambda c: c["annotations"].reverse(), "images entry 1 is beside an annotation of image_id 3"),
    ("refcoco", 0, lambda c: c["annotations"].pop(), r"3 images but 2 annotations; they are paired by order"),
    ("refcoco+", 0, lambda c: c["annotations"][1].update(bbox=[1, 2, 3]),
     r"finetune_refcoco\+_train\.json, annotations\[1\] \(id 1\): not enough values"),
    ("refcocog", 0, lambda c: c["images"][1].update(width=0),
     r"finetune_refcocog_train\.json, id 1: the box .* cannot be normalized by an image of 0\.0 x 480\.0 pixels"),
    ("visualgenome", 0, lambda c: c[1]["regions"][0].pop("phrase"),
     r"region_descriptions\.json, entry 1 \(id 2\), regions\[0\]: the field 'phrase' is missing"),
    ("visualgenome", 1, lambda c: c.pop(0),
     r"entry 0 \(id 1\), regions\[0\]: image_data\.json does not give the size of image 1"),
    ("visualgenome", 1, lambda c: c[2].pop("width"), r"image_data\.json, entry 2.*: the field 'width' is missing"),
    ("llava150k", 0, lambda c: c[0]["conversations"].pop(1),
     r"entry 0 \(id 000000033471\): the turns do not alternate .* \['human', 'human', 'gpt'\]"),
    ("llava150k", 0, lambda c: c[1]["conversations"].reverse(), "do not alternate"),
    ("llava150k", 0, lambda c: c[1].update(conversations=[]), "do not alternate"),
    ("llava150k", 0, lambda c: c[1].pop("image"), r"entry 1 \(id 000000033471\): the field 'image' is missing"),
    ("aokvqa", 0, lambda c: c[1].update(choices="bus"), "choices must be a list, got 'bus'"),
    ("aokvqa", 0, lambda c: c[1].update(choices={"bus": 1}), "choices must be a list, got {'bus': 1}"),
    ("aokvqa", 0, lambda c: c[1].update(correct_choice_idx=1.5), "correct_choice_idx must be a whole number, got 1.5"),
    ("aokvqa", 0, lambda c: c[1].update(correct_choice_idx=True), "correct_choice_idx must be a whole number"),
    ("aokvqa", 0, lambda c: c[1].update(image_id=None), "image_id must be a whole number, got None"),
    ("aokvqa", 0, lambda c: c.__setitem__(1, None), r"entry 1: an entry must be an object, got None"),
    ("aokvqa", 0, lambda c: c.__setitem__(1, [1, 2]), r"entry 1: an entry must be an object, got \[1, 2\]"),
    ("gqa", 0, lambda c: c.update({"02930152": 7}), "entry '02930152': an entry must be an object, got 7"),
    ("gqa", 0, lambda c: c["02930152"].update(question=float("nan")), "question must be text, got nan"),
    ("scienceqa", 0, lambda c: c["2"].update(answer="one"), "answer must be a whole number, got 'one'"),
    ("refcoco", 0, lambda c: c["annotations"][0].update(bbox="1234"), "bbox must be a list, got '1234'"),
    ("refcoco", 0, lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 4]), "box .* cannot be normalized"),
    ("refcoco", 0, lambda c: c["annotations"][0].update(bbox=[300, 200, 100, -50]), "has a negative size"),
    ("refcoco", 0, lambda c: c["images"].__setitem__(0, None), r"images\[0\]: a value is of a wrong type"),
    ("llava150k", 0, lambda c: c[0].update(conversations={"from": "human"}), "conversations must be a list"),
    ("llava150k", 0, lambda c: c[0]["conversations"].__setitem__(0, None), "a value is of a wrong type"),
    ("visualgenome", 0, lambda c: c[0].update(regions="many"), "regions must be a list, got 'many'"),
    ("visualgenome", 0, lambda c: c[0]["regions"].__setitem__(0, None), r"regions\[0\]: a value is of a wrong type"),
    ("visualgenome", 1, lambda c: c[0].update(width=640.5), "width must be a whole number, got 640.5"),
    ("gqa", 0, lambda c: c["02930152"].update(answer="\ud83d"), "entry '02930152': answer holds half of a surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "file", "change", "message"), MALFORMED, ids=[f"{m[0]}: {m[3][-30:]}" for m in MALFORMED]
)
def test_a_malformed_entry_names_file_and_entry(root: Path, name: str, file: int, change: Change, message: str) -> None:
    edit(root, train_files(name)[file], change)
    with pytest.raises(DataError, match=message) as caught:
        open_sources(root, [name], "train")
    assert train_files(name)[file] in str(caught.value) or train_files(name)[0] in str(caught.value)


JSON_FILES = [(name, file) for name in DATASETS for file in train_files(name) if file.endswith(".json")]


@pytest.mark.parametrize(("name", "file"), JSON_FILES)
@pytest.mark.parametrize("damage", ["cut", "not json", "not text", "other outline", "more"])
def test_a_file_that_is_no_json_is_named(root: Path, name: str, file: str, damage: str) -> None:
    good = (root / file).read_bytes()
    bad = {"cut": good[: len(good) * 2 // 3], "not json": b"{ not json", "not text": b"\xff\xfe" + good,
           "other outline": b"3", "more": good + b" ]"}[damage]  # fmt: skip
    (root / file).write_bytes(bad)
    with pytest.raises(DataError, match="is not valid JSON") as caught:
        open_sources(root, [name], "train")
    assert str(root / file) in str(caught.value)


FOREIGN = [
    (gzip.compress(b"{}"), "gzip"),
    (b"", r"empty \(0 bytes\)"),
    (b"<!DOCTYPE html><html></html>", r"HTML \(an error page\?\)"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
    ('{"a": 1}'.encode("utf-16"), "text in UTF-16"),
    (b"PK\x03\x04" + bytes(60), "a zip archive"),
    (bytes(600), "zeros"),
]


@pytest.mark.parametrize(("content", "kind"), FOREIGN, ids=[kind for _, kind in FOREIGN])
@pytest.mark.parametrize("name", ["vqav2", "vsr", "aokvqa", "refcocog"])
def test_an_annotation_file_of_another_format_is_named_by_it(root: Path, name: str, content: bytes, kind: str) -> None:
    path = put(root, train_files(name)[0], content)
    with pytest.raises(DataError, match=rf"^{path} is not valid JSON but {kind}.*; put the file there as it was"):
        open_sources(root, [name], "train", max_bad_fraction=1.0)


@pytest.mark.parametrize("name", ["vqav2", "gqa", "aokvqa", "refcoco", "visualgenome"])
def test_a_number_of_thousands_of_digits_is_an_error_of_its_record(root: Path, name: str) -> None:
    path = root / train_files(name)[0]
    good = len(open_sources(root, [name], "train")[name])
    fields = {"gqa": (b'"imageId": "2354786"', b'"imageId": '), "refcoco": (b'"id": 1,', b'"id": ')}
    old, new = fields.get(name, (b'"image_id": 1,', b'"image_id": '))
    path.write_bytes(path.read_bytes().replace(old, new + b"9" * 5000 + b"," * old.endswith(b","), 1))
    samples = open_sources(root, [name], "train", max_bad_fraction=0.001)[name]
    assert len(samples) == good - 1 and "got inf" in "".join(samples.faults.lines())


HALF = "\ud83d"
TEXT_FIELDS: list[tuple[str, int, Change]] = [
    ("vqav2", 0, lambda c: c["questions"][0].update(question=HALF)),
    ("vqav2", 1, lambda c: c["annotations"][0].update(multiple_choice_answer=HALF)),
    ("vqav2", 1, lambda c: c["annotations"][0].update(question_type=HALF)),
    ("gqa", 0, lambda c: c["02930152"].update(question=HALF)),
    ("gqa", 0, lambda c: c["02930152"].update(imageId=HALF)),
    ("gqa", 0, lambda c: c["02930152"]["types"].update(structural=HALF)),
    ("gqa", 0, lambda c: c.update({HALF: c.pop("02930152")})),
    ("ocrvqa", 0, lambda c: c["0761183272"]["questions"].__setitem__(0, HALF)),
    ("ocrvqa", 0, lambda c: c["0761183272"]["answers"].__setitem__(0, HALF)),
    ("ocrvqa", 0, lambda c: c["0761183272"].update(imageURL=HALF)),
    ("ocrvqa", 0, lambda c: c.update({HALF: c.pop("0761183272")})),
    ("aokvqa", 0, lambda c: c[0].update(question=HALF)),
    ("aokvqa", 0, lambda c: c[0].update(question_id=HALF)),
    ("aokvqa", 0, lambda c: c[0]["choices"].__setitem__(2, HALF)),
    ("scienceqa", 0, lambda c: c["1"].update(question=HALF)),
    ("scienceqa", 0, lambda c: c["1"].update(hint=HALF)),
    ("scienceqa", 0, lambda c: c["1"].update(image=HALF)),
    ("scienceqa", 0, lambda c: c["1"]["choices"].__setitem__(1, HALF)),
    ("scienceqa", 0, lambda c: c.update({HALF: c.pop("1")})),
    ("refcoco", 0, lambda c: c["images"][0].update(caption=HALF)),
    ("refcoco", 0, lambda c: c["images"][0].update(file_name=HALF)),
    ("visualgenome", 0, lambda c: c[0]["regions"][0].update(phrase=HALF)),
    ("llava150k", 0, lambda c: c[0].update(id=HALF)),
    ("llava150k", 0, lambda c: c[0].update(image=HALF)),
    ("llava150k", 0, lambda c: c[0]["conversations"][2].update(value=HALF)),
]


@pytest.mark.parametrize(("name", "file", "change"), TEXT_FIELDS)
def test_half_a_surrogate_pair_in_any_field_is_one_fault_that_names_it(
    root: Path, name: str, file: int, change: Change
) -> None:
    if name == "ocrvqa":  # a second cover of this split, so that a sample is left
        edit(root, train_files(name)[0], lambda c: c["1400031354"].update(split=1))
    good = {sample.key for sample in open_sources(root, [name], "train")[name]}
    edit(root, train_files(name)[file], change)
    samples = open_sources(root, [name], "train", max_bad_fraction=0.001)[name]
    assert {sample.key for sample in samples} < good and samples.faults.total == 1
    (line,) = samples.faults.lines()
    assert train_files(name)[file] in line and "holds half of a surrogate pair ('\\ud83d')" in line
    line.encode()


def test_a_pair_of_two_malformed_halves_is_one_fault(root: Path) -> None:
    edit(root, train_files("refcoco")[0], lambda c: c["images"].__setitem__(0, {}))
    edit(root, train_files("refcoco")[0], lambda c: c["annotations"].__setitem__(0, {}))
    samples = open_sources(root, ["refcoco"], "train", max_bad_fraction=0.001)["refcoco"]
    assert len(samples) == 2 and samples.faults.total == 1 and "images[0]" in samples.faults.lines()[0]


def test_a_malformed_question_is_one_fault(root: Path) -> None:
    edit(root, train_files("vqav2")[0], lambda c: c["questions"][1].update(question=None))
    samples = open_sources(root, ["vqav2"], "train", max_bad_fraction=0.001)["vqav2"]
    assert len(samples) == 2 and samples.faults.total == 1


def test_a_bad_vsr_line_is_left_out_by_its_number(root: Path) -> None:
    file = root / "vsr/train-random.jsonl"
    lines = file.read_text().splitlines()
    lines[1] = lines[1][:20]
    file.write_text("\n".join(lines))
    samples = open_sources(root, ["vsr"], "train", max_bad_fraction=0.001)["vsr"]
    assert [sample.key for sample in samples] == ["vsr/relation/1", "vsr/relation/3"]
    assert samples.faults.total == 1 and "train-random.jsonl, line 2: " in samples.faults.lines()[0]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("label", 2, "label must be 0 or 1, got 2"),
        ("caption", None, "caption must be text"),
        ("image_link", "http://images.example/test2017/1.jpg", r"image_link must end in one of \['train2017'"),
        ("image_link", "http://images.example/train2017/..", "leads out of the data root"),
        ("image_link", "1.jpg", "not enough values"),
    ],
)
def test_bad_vsr_fields(root: Path, field: str, value: object, message: str) -> None:
    lines = (root / "vsr/train-random.jsonl").read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), field: value})
    (root / "vsr/train-random.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        open_sources(root, ["vsr"], "train")["vsr"][0]


ESCAPES: list[tuple[str, Change]] = [
    ("refcoco", lambda c: c["images"][0].update(file_name="../../../etc/passwd")),
    ("refcoco", lambda c: c["images"][0].update(file_name="/etc/passwd")),
    ("refcoco", lambda c: c["images"][0].update(file_name="a/../../x.jpg")),
    ("refcoco", lambda c: c["images"][0].update(file_name="C:/x.jpg")),
    ("refcoco", lambda c: c["images"][0].update(file_name="..\\x.jpg")),
    ("refcocog", lambda c: c["images"][0].update(file_name="")),
    ("vqav2", lambda c: c.update(data_subtype="../../../x")),
    ("gqa", lambda c: c["02930152"].update(imageId="../../x")),
    ("gqa", lambda c: c["02930152"].update(imageId="/etc/x")),
    ("ocrvqa", lambda c: c.update({"../../0761183272": c.pop("0761183272")})),
    ("scienceqa", lambda c: c["1"].update(image="../../../x.png")),
    ("scienceqa", lambda c: c.update({"..": c.pop("1")})),
    ("llava150k", lambda c: c[0].update(image="../../x.jpg")),
    ("llava150k", lambda c: c[0].update(image="/x.jpg")),
]


@pytest.mark.parametrize(("name", "change"), ESCAPES)
def test_file_names_cannot_leave_the_root(root: Path, name: str, change: Change) -> None:
    edit(root, train_files(name)[0], change)
    samples = open_sources(root, [name], "train")[name]
    messages = []
    for index in range(len(samples)):
        try:
            for image in samples[index].images:
                assert isinstance(image, Path) and image.resolve().is_relative_to(root.resolve())
        except DataError as error:
            messages.append(str(error))
    assert messages and all(f"Sample {name}/" in text and "leads out of the data root" in text for text in messages)


@pytest.mark.parametrize("image_id", ["../1", 1.5, None, [1]])
def test_image_ids_are_numbers(root: Path, image_id: object) -> None:
    edit(root, train_files("visualgenome")[0], lambda c: c[0]["regions"][0].update(image_id=image_id))
    samples = open_sources(root, ["visualgenome"], "train", max_bad_fraction=0.001)["visualgenome"]
    assert all(sample.images[0].parent == root / "VisualGenome/images" for sample in samples)
    assert "entry 0 (id 1), regions[0]: image_id must be a whole number, got " in samples.faults.lines()[0]


@pytest.mark.parametrize("side", [None, "12", float("nan")])
def test_a_bad_box_of_visual_genome_is_left_out(root: Path, side: object) -> None:
    edit(root, train_files("visualgenome")[0], lambda c: c[0]["regions"][1].update(width=side))
    samples = open_sources(root, ["visualgenome"], "train", max_bad_fraction=0.001)["visualgenome"]
    assert [sample.key for sample in samples] == ["visualgenome/region/1382", "visualgenome/region/4092"]
    assert "entry 0 (id 1), regions[1]: " in samples.faults.lines()[0]


def test_a_source_without_samples_is_an_error(root: Path) -> None:
    put(root, train_files("llava150k")[0], [])
    with pytest.raises(DataError, match=r"\['llava150k'\] .* no sample in split 'train'"):
        open_sources(root, ["gqa", "llava150k"], "train")


def test_an_id_with_two_answers_is_refused(root: Path) -> None:
    questions, annotations = (root / f"VQA/v2_{name}_train2014_{kind}.json" for name, kind in (
        ("OpenEnded_mscoco", "questions"), ("mscoco", "annotations")))  # fmt: skip
    original = annotations.read_text()
    content = json.loads(original)
    content["annotations"].append({**content["annotations"][0], "multiple_choice_answer": "other"})
    annotations.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"annotations\.json \(question_id 30\): two annotations of one question_id"):
        open_sources(root, ["vqav2"], "train")
    content["annotations"][-1] = content["annotations"][0]  # the same twice: nothing is in doubt
    annotations.write_text(json.dumps(content))
    assert len(open_sources(root, ["vqav2"], "train")["vqav2"]) == 3
    annotations.write_text(original)
    content = json.loads(questions.read_text())
    content["questions"].append({**content["questions"][1], "question": "Another question?"})
    questions.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"2 x .*questions\[3\] \(question_id 20\): another question has this"):
        open_sources(root, ["vqav2"], "train")
