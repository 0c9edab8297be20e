"""The dataset on disk: schemas, answers, the same bytes every time, and changed or foreign folders."""

import hashlib
import json
import re
import runpy
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import reference_answers
import yaml
from PIL import Image

from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.data.shards import CaptionDataset
from aki_megatron.data.sources import SPLITS, dataset_reader, open_sources, with_split
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import DataError
from aki_megatron.families.registry import FAMILIES
from aki_megatron.synthetic.dataset import MANIFEST, DatasetSize, is_complete, was_interrupted, write_dataset
from aki_megatron.synthetic.questions import TASK_WEIGHTS
from aki_megatron.types import Modality

TOOL = Path(__file__).parents[2] / "tools" / "make_data.py"
SIZE = DatasetSize(train_scenes=400, val_scenes=100, seed=5)
FIRST_VAL_ID = 500_001
FIRST_FOUR = {
    "A-OKVQA/aokvqa_v1p0_train.json": "a74fed78f0e11f27",
    "A-OKVQA/aokvqa_v1p0_val.json": "ab12bb7d5a8f9ed7",
    "VQA/v2_OpenEnded_mscoco_train2014_questions.json": "8d636c767faf21a4",
    "VQA/v2_OpenEnded_mscoco_val2014_questions.json": "3cd4bad6aa0f750f",
    "VQA/v2_mscoco_train2014_annotations.json": "738c1358fa0ac8f0",
    "VQA/v2_mscoco_val2014_annotations.json": "38f3d5fb2403b5c2",
    "ref/annotations/finetune_refcoco_train.json": "446c77c587f755ba",
    "ref/annotations/finetune_refcoco_val.json": "4b6a2635fe94bf21",
    "vsr/dev-random.jsonl": "b406ca7b33846ea8",
    "vsr/test-random.jsonl": "bdda8ad44446435f",
    "vsr/train-random.jsonl": "0d2bdb6e5f5c2567",
}
"""Annotation file of DatasetSize(10, 5, seed=1) -> prefix of its sha256. Images depend on the JPEG library."""

VERSION_5 = {"version": 5, "size": {"scenes": 10, "held_out": 5, "seed": 1}, "counts": {}, "pictures": {}}
"""A manifest as it was up to version 5, without its digests."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    steps: list[int] = []
    write_dataset(folder, SIZE, steps.append)
    of_captions = SIZE.train_scenes + SIZE.val_scenes
    assert steps[:of_captions] == list(range(1, of_captions + 1))
    assert steps == sorted(steps) and steps[-1] == SIZE.total
    return folder


@pytest.fixture(scope="module")
def captions(root: Path) -> dict[int, str]:
    """Image id -> caption, of both splits."""
    train, val = CaptionDataset(["captions/00000.tar"], root), CaptionDataset(["captions_val/00000.tar"], root)
    found = {1 + number: train.caption(number).text for number in range(len(train))}
    return found | {FIRST_VAL_ID + number: val.caption(number).text for number in range(len(val))}


def load(root: Path, name: str):
    return json.loads((root / name).read_text())


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of the dataset; readers of the tars write indexes beside them."""
    written_by_readers = (".index", ".manifest")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in written_by_readers)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_another_process_writes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    options = ["--train_scenes", str(SIZE.train_scenes), "--val_scenes", str(SIZE.val_scenes), "--seed", str(SIZE.seed)]
    result = subprocess.run(
        [sys.executable, str(TOOL), "--out", str(tmp_path / "again"), *options],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(TOOL.parents[1]), "PYTHONHASHSEED": "123", "PATH": ""},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert digests(tmp_path / "again") == digests(root)


def test_the_tool_does_nothing_twice_and_never_overwrites_another_set(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = runpy.run_path(str(TOOL))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    options = ["--train_scenes", str(SIZE.train_scenes), "--val_scenes", str(SIZE.val_scenes)]
    monkeypatch.setattr(sys, "argv", ["make_data", "--out", str(root), *options, "--seed", str(SIZE.seed)])
    assert tool["main"]() == 0
    assert "complete, nothing to do" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["make_data", "--out", str(root), *options, "--seed", "6"])
    assert tool["main"]() == 2
    assert "holds another dataset" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(("split", "first_id"), [("train", 1), ("val", FIRST_VAL_ID)])
def test_vqav2_has_the_public_schema_and_correct_answers(
    root: Path, captions: dict[int, str], split: str, first_id: int
) -> None:
    questions = load(root, f"VQA/v2_OpenEnded_mscoco_{split}2014_questions.json")
    annotated = load(root, f"VQA/v2_mscoco_{split}2014_annotations.json")
    assert questions.keys() == {"info", "license", "data_type", "data_subtype", "task_type", "questions"}
    assert annotated.keys() == {"info", "license", "data_type", "data_subtype", "annotations"}
    assert questions["data_subtype"] == annotated["data_subtype"] == f"{split}2014"
    tasks: Counter[str] = Counter()
    adversarial: list[bool] = []
    types = {"count": "number", "exist": "yes/no", "color": "other", "ocr": "other", "hop": "other"}
    for question, annotation in zip(questions["questions"], annotated["annotations"], strict=True):
        assert question.keys() == {"image_id", "question", "question_id"}
        assert annotation.keys() == {
            *("question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id")
        }
        assert question["question_id"] == annotation["question_id"]
        assert question["image_id"] == annotation["image_id"] >= first_id
        task, answer = annotation["question_type"], annotation["multiple_choice_answer"]
        tasks[task] += 1
        assert annotation["answer_type"] == types[task]
        assert [entry["answer_id"] for entry in annotation["answers"]] == list(range(1, 11))
        assert Counter(entry["answer"] for entry in annotation["answers"]).most_common(1) == [(answer, 10)]
        assert answer == reference_answers.answer(task, question["question"], captions[question["image_id"]])
        if task == "exist" and answer == "no":
            adversarial.append(reference_answers.is_adversarial(question["question"], captions[question["image_id"]]))
        image = root / f"VQA/{split}2014/COCO_{split}2014_{question['image_id']:012}.jpg"
        assert image.is_file()
    assert set(tasks) == set(types)
    rates = [tasks[task] / TASK_WEIGHTS[task] for task in types]
    assert min(rates) > 0.7 * max(rates), "the tasks are asked according to their weights"
    assert 0.4 < sum(adversarial) / len(adversarial) < 0.9, "absent objects are sampled at random and adversarially"
    ids = [question["question_id"] for question in questions["questions"]]
    assert len(set(ids)) == len(ids)


def test_no_task_is_answered_by_its_most_frequent_answer(root: Path) -> None:
    limits = {"count": 0.5, "color": 0.35, "exist": 0.62, "ocr": 0.45, "hop": 0.12}
    given: dict[str, Counter[str]] = {task: Counter() for task in limits}
    for annotation in load(root, "VQA/v2_mscoco_train2014_annotations.json")["annotations"]:
        given[annotation["question_type"]][annotation["multiple_choice_answer"]] += 1
    for task, limit in limits.items():
        assert given[task].most_common(1)[0][1] / given[task].total() < limit, task


@pytest.mark.parametrize(("name", "subset"), [("train", "train2017"), ("dev", "val2017"), ("test", "val2017")])
def test_vsr_has_the_public_schema_and_correct_labels(
    root: Path, captions: dict[int, str], name: str, subset: str
) -> None:
    rows = [json.loads(line) for line in (root / f"vsr/{name}-random.jsonl").read_text().splitlines()]
    folder = {"train2017": "A-OKVQA/train2017", "val2017": "vsr/val2017"}[subset]
    for row in rows:
        assert row.keys() == {
            *("image", "image_link", "caption", "label", "relation", "annotator_id"),
            *("vote_true_validator_id", "vote_false_validator_id"),
        }
        assert row["image_link"].split("/")[-2:] == [subset, row["image"]]
        assert (root / folder / row["image"]).is_file()
        assert row["label"] == reference_answers.is_true(row["caption"], captions[int(row["image"].split(".")[0])])
        assert f" is {row['relation']} the " in row["caption"]
        assert bool(row["vote_true_validator_id"]) == bool(row["label"]) != bool(row["vote_false_validator_id"])
    assert 0.25 < sum(row["label"] for row in rows) / len(rows) < 0.75


@pytest.mark.parametrize("split", ["train", "val"])
def test_aokvqa_has_the_public_schema_and_correct_choices(root: Path, captions: dict[int, str], split: str) -> None:
    rows = load(root, f"A-OKVQA/aokvqa_v1p0_{split}.json")
    for row in rows:
        assert row.keys() == {
            *("split", "image_id", "question_id", "question", "choices", "correct_choice_idx"),
            *("direct_answers", "difficult_direct_answer", "rationales"),
        }
        assert row["split"] == split and re.fullmatch(r"\w{22}", row["question_id"])
        assert len(row["choices"]) == len(set(row["choices"])) == 4
        (cell_name,) = re.fullmatch(r"Which object is ([a-z-]+)\?", row["question"]).groups()
        correct = reference_answers.object_at(cell_name, captions[row["image_id"]])
        assert row["choices"][row["correct_choice_idx"]] == correct
        assert row["direct_answers"] == [correct] * 10
        assert (root / f"A-OKVQA/{split}2017/{row['image_id']:012}.jpg").is_file()
    assert len({row["question_id"] for row in rows}) == len(rows)
    correct_indices = Counter(row["correct_choice_idx"] for row in rows)
    assert max(correct_indices.values()) < 0.36 * len(rows)


@pytest.mark.parametrize("split", ["train", "val"])
def test_refcoco_has_mdetrs_schema_and_correct_phrases(root: Path, captions: dict[int, str], split: str) -> None:
    content = load(root, f"ref/annotations/finetune_refcoco_{split}.json")
    assert content.keys() == {"info", "licenses", "images", "annotations", "categories"}
    formats = Counter()
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        assert image.keys() == {*("file_name", "height", "width", "id", "original_id", "caption", "dataset_name")}
        assert annotation.keys() >= {*("area", "iscrowd", "image_id", "category_id", "id", "bbox", "original_id")}
        assert annotation["image_id"] == image["id"]
        x, y, width, height = annotation["bbox"]
        assert (width, height) == (12, 12) and annotation["area"] == width * height
        objects = reference_answers.objects_of(captions[image["original_id"]])
        assert image["caption"] == " ".join(objects[x // 12, y // 12])
        assert annotation["tokens_positive"] == [[0, len(image["caption"])]]
        with Image.open(root / "VQA/train2014" / image["file_name"]) as image_file:
            assert (image_file.width, image_file.height) == (image["width"], image["height"])
            formats[image_file.format] += 1
    assert formats["JPEG"] > formats["PNG"] > 0


def test_shards_hold_pairs_of_jpeg_or_png_and_text(root: Path) -> None:
    with tarfile.open(root / "captions/00000.tar") as tar:
        members = tar.getmembers()
        assert all(member.mtime == 0 and member.uid == 0 and not member.uname for member in members)
    assert [member.name for member in members[6:12]] == [
        *("000000003.jpg", "000000003.txt", "000000004.png", "000000004.txt", "000000005.jpg", "000000005.txt")
    ]
    assert len(members) == 2 * SIZE.train_scenes


def test_jpegs_keep_their_colors(root: Path) -> None:
    with Image.open(root / "VQA/train2014/COCO_train2014_000000000001.jpg") as image_file:
        assert image_file.format == "JPEG" and image_file.mode == "RGB" and image_file.size == (36, 36)
        assert [component[1:3] for component in image_file.layer] == [(1, 1)] * 3, "4:4:4, no subsampling"


def test_val_scenes_are_not_those_of_training(captions: dict[int, str]) -> None:
    train = {text for number, text in captions.items() if number < FIRST_VAL_ID}
    val = {text for number, text in captions.items() if number >= FIRST_VAL_ID}
    assert not train & val


def test_every_source_reads_the_files_and_samples_are_short(root: Path) -> None:
    tokenizer = Tokenizer(root / "tokenizer", FAMILIES["phi3"].chat)
    template = Template(
        tokenizer, num_media_tokens={Modality.IMAGE: 9}, max_text_tokens=64, system_message=SYSTEM_MESSAGE
    )
    for source in ("vqav2", "vsr", "aokvqa", "refcoco"):
        for split in ("train", "val"):
            for conversation in dataset_reader(source).read(root, split):
                assert isinstance(conversation.images[0], Path) and conversation.images[0].is_file()
                sample = template.render_conversation(conversation)
                assert sample is not None
                assert len(sample.token_ids) - 9 <= 28, [tokenizer.token_name(number) for number in sample.token_ids]
                assert len(sample.token_ids) - 9 <= 20 or source == "aokvqa"


def test_every_source_reads_its_extra_dataset(root: Path) -> None:
    """The tokenizer was not trained on these texts; it falls back to bytes, never to <unk>."""
    tokenizer = Tokenizer(root / "tokenizer", FAMILIES["phi3"].chat)
    template = Template(
        tokenizer, num_media_tokens={Modality.IMAGE: 9}, max_text_tokens=512, system_message=SYSTEM_MESSAGE
    )
    names = {"gqa": 2.5, "ocrvqa": 5, "scienceqa": 1, "refcoco+": 2, "refcocog": 2, "visualgenome": 4, "llava150k": 0.4}
    for split in SPLITS:
        opened = open_sources(root, with_split(names, split), split)
        for name, rows in opened.items():
            assert len(rows) >= 20 * names[name], name
            without_image = 0
            for conversation in rows:
                without_image += not conversation.images
                assert not conversation.images or conversation.images[0].is_file()
                sample = template.render_conversation(conversation)
                assert sample is not None and len(sample.token_ids) - 9 < 256
                assert "<unk>" not in {tokenizer.token_name(number) for number in sample.token_ids}
                for turn in conversation.turns:
                    ids = tokenizer.encode(f"<|assistant|>{turn.response}")
                    assert tokenizer.decode(ids) == turn.response
            assert (without_image > 0) == (name == "scienceqa")
    sft = yaml.safe_load((Path(__file__).parents[2] / "configs/aki4b/sft.yaml").read_text())
    papers = {source["name"] for source in sft["data"]["sources"]}
    assert papers == {*names, "vqav2", "vsr", "aokvqa", "refcoco"}, "all datasets of the papers are written"


def test_the_extra_datasets_do_not_change_the_first_four(tmp_path: Path) -> None:
    """The digests were taken before the extra datasets existed; the demo's accuracies depend on these files."""
    write_dataset(tmp_path / "data", DatasetSize(train_scenes=10, val_scenes=5, seed=1), lambda done: None)
    found = {name: digest[:16] for name, digest in digests(tmp_path / "data").items() if name in FIRST_FOUR}
    assert found == FIRST_FOUR


def test_changed_or_missing_files_are_noticed_and_written_again(tmp_path: Path) -> None:
    size = DatasetSize(train_scenes=10, val_scenes=5, seed=1)
    folder = tmp_path / "data"
    counts = write_dataset(folder, size, lambda done: None)
    whole = digests(folder)
    assert is_complete(folder, size) and counts["train/captions"] == 10
    manifest = json.loads((folder / MANIFEST).read_text())
    for version in (manifest["version"] - 1, manifest["version"]):  # an earlier version is rewritten
        (folder / MANIFEST).write_text(json.dumps({**manifest, "version": version}, indent=1) + "\n")
        assert is_complete(folder, size) == (version == manifest["version"])
    (folder / MANIFEST).write_text(json.dumps(VERSION_5 | {"sha256": manifest["sha256"]}))
    assert not is_complete(folder, size), "a manifest with the keys of version 5"
    write_dataset(folder, size, lambda done: None)
    assert digests(folder) == whole
    (folder / "encoder").mkdir()
    (folder / "encoder/keep").write_text("written by another tool")
    next((folder / "VQA/train2014").iterdir()).unlink()
    assert not is_complete(folder, size)
    write_dataset(folder, size, lambda done: None)
    assert is_complete(folder, size) and (folder / "encoder/keep").exists()
    with (folder / "vsr/train-random.jsonl").open("a") as file:
        file.write("{}\n")
    assert not is_complete(folder, size)
    write_dataset(folder, size, lambda done: None)
    assert {name: digest for name, digest in digests(folder).items() if name != "encoder/keep"} == whole


def test_an_interrupted_write_is_noticed_and_repeated(tmp_path: Path) -> None:
    size, folder = DatasetSize(train_scenes=10, val_scenes=5, seed=1), tmp_path / "data"

    def interrupt(done: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(folder, size, interrupt)
    assert was_interrupted(folder) and not is_complete(folder, size)
    write_dataset(folder, size, lambda done: None)
    assert is_complete(folder, size) and not was_interrupted(folder)
    write_dataset(tmp_path / "undisturbed", size, lambda done: None)
    assert digests(folder) == digests(tmp_path / "undisturbed")


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "VQA").mkdir()
    (tmp_path / "VQA/precious").write_text("coco")
    with pytest.raises(DataError, match="holds other files"):
        write_dataset(tmp_path, DatasetSize(train_scenes=10, val_scenes=5), lambda done: None)
    (tmp_path / MANIFEST).write_text('{"name": "an app"}')
    with pytest.raises(DataError, match="not a manifest of make_data"):
        is_complete(tmp_path, DatasetSize(train_scenes=10, val_scenes=5))
    assert (tmp_path / "VQA/precious").read_text() == "coco"


def test_a_larger_pool_begins_with_the_smaller_one(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "small", DatasetSize(train_scenes=20, val_scenes=10, seed=SIZE.seed), lambda done: None)
    for image in (tmp_path / "small/VQA/train2014").iterdir():
        assert image.read_bytes() == (root / "VQA/train2014" / image.name).read_bytes()


@pytest.mark.parametrize("wrong", [{"train_scenes": 0}, {"train_scenes": 500_001}, {"val_scenes": 0}, {"seed": -1}])
def test_sizes_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="train_scenes must lie in"):
        DatasetSize(**wrong)
