"""The files on disk: schemas, answers, the same bytes every time, and what happens to a folder that was changed."""

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
import synthetic_answers
from PIL import Image

from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.data.chat import CHATS
from aki_megatron.data.shards import ShardIndex
from aki_megatron.data.sources import SOURCES, SPLITS, open_sources, with_split
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.errors import DataError
from aki_megatron.synthetic.dataset import MANIFEST, DatasetSize, is_complete, make_dataset, was_interrupted
from aki_megatron.synthetic.questions import SHARES

TOOL = Path(__file__).parents[2] / "tools" / "make_data.py"
SIZE = DatasetSize(scenes=400, held_out=100, seed=5)
FIRST_HELD_OUT_ID = 500_001
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
"""Annotation file of scenes=10, held_out=5, seed=1 -> how its sha256 begins. Pictures depend on the JPEG library."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    steps: list[int] = []
    make_dataset(folder, SIZE, steps.append)
    drawn = SIZE.scenes + SIZE.held_out
    assert steps[:drawn] == list(range(1, drawn + 1))
    assert steps == sorted(steps) and steps[-1] == SIZE.total
    return folder


@pytest.fixture(scope="module")
def captions(root: Path) -> dict[int, str]:
    """Image id -> caption, of both splits."""
    train, held_out = ShardIndex(["captions/00000.tar"], root), ShardIndex(["captions_val/00000.tar"], root)
    found = {1 + number: train.caption(number).text for number in range(len(train))}
    return found | {FIRST_HELD_OUT_ID + number: held_out.caption(number).text for number in range(len(held_out))}


def load(root: Path, name: str):
    return json.loads((root / name).read_text())


def digests(folder: Path) -> dict[str, str]:
    """Of what is drawn: whoever reads tars writes their indexes beside them."""
    of_readers = (".index", ".manifest")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in of_readers)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_another_process_writes_the_same_bytes(root: Path, tmp_path: Path) -> None:
    options = ["--scenes", str(SIZE.scenes), "--held_out", str(SIZE.held_out), "--seed", str(SIZE.seed)]
    made = subprocess.run(
        [sys.executable, str(TOOL), "--out", str(tmp_path / "again"), *options],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(TOOL.parents[1]), "PYTHONHASHSEED": "123", "PATH": ""},
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert digests(tmp_path / "again") == digests(root)


def test_the_tool_does_nothing_twice_and_never_overwrites_another_set(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = runpy.run_path(str(TOOL))
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    options = ["--scenes", str(SIZE.scenes), "--held_out", str(SIZE.held_out)]
    monkeypatch.setattr(sys, "argv", ["make_data", "--out", str(root), *options, "--seed", str(SIZE.seed)])
    assert tool["main"]() == 0
    assert "complete, nothing to do" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["make_data", "--out", str(root), *options, "--seed", "6"])
    assert tool["main"]() == 2
    assert "holds another data set" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


@pytest.mark.parametrize(("split", "first_id"), [("train", 1), ("val", FIRST_HELD_OUT_ID)])
def test_vqav2_has_the_public_schema_and_right_answers(
    root: Path, captions: dict[int, str], split: str, first_id: int
) -> None:
    asked = load(root, f"VQA/v2_OpenEnded_mscoco_{split}2014_questions.json")
    answered = load(root, f"VQA/v2_mscoco_{split}2014_annotations.json")
    assert asked.keys() == {"info", "license", "data_type", "data_subtype", "task_type", "questions"}
    assert answered.keys() == {"info", "license", "data_type", "data_subtype", "annotations"}
    assert asked["data_subtype"] == answered["data_subtype"] == f"{split}2014"
    tasks: Counter[str] = Counter()
    adversarial: list[bool] = []
    types = {"count": "number", "exist": "yes/no", "color": "other", "ocr": "other", "hop": "other"}
    for question, annotation in zip(asked["questions"], answered["annotations"], strict=True):
        assert question.keys() == {"image_id", "question", "question_id"}
        assert annotation.keys() == {
            *("question_type", "multiple_choice_answer", "answers", "image_id", "answer_type", "question_id")
        }
        assert question["question_id"] == annotation["question_id"]
        assert question["image_id"] == annotation["image_id"] >= first_id
        task, gold = annotation["question_type"], annotation["multiple_choice_answer"]
        tasks[task] += 1
        assert annotation["answer_type"] == types[task]
        assert [entry["answer_id"] for entry in annotation["answers"]] == list(range(1, 11))
        assert Counter(entry["answer"] for entry in annotation["answers"]).most_common(1) == [(gold, 10)]
        assert gold == synthetic_answers.answer(task, question["question"], captions[question["image_id"]])
        if task == "exist" and gold == "no":
            adversarial.append(synthetic_answers.is_adversarial(question["question"], captions[question["image_id"]]))
        image = root / f"VQA/{split}2014/COCO_{split}2014_{question['image_id']:012}.jpg"
        assert image.is_file()
    assert set(tasks) == set(types)
    rates = [tasks[task] / SHARES[task] for task in types]
    assert min(rates) > 0.7 * max(rates), "the tasks are asked in their shares"
    assert 0.4 < sum(adversarial) / len(adversarial) < 0.9, "absent objects are drawn at random and adversarially"
    ids = [question["question_id"] for question in asked["questions"]]
    assert len(set(ids)) == len(ids)


def test_no_task_is_answered_by_its_most_frequent_answer(root: Path) -> None:
    limits = {"count": 0.5, "color": 0.35, "exist": 0.62, "ocr": 0.45, "hop": 0.12}
    given: dict[str, Counter[str]] = {task: Counter() for task in limits}
    for annotation in load(root, "VQA/v2_mscoco_train2014_annotations.json")["annotations"]:
        given[annotation["question_type"]][annotation["multiple_choice_answer"]] += 1
    for task, limit in limits.items():
        assert given[task].most_common(1)[0][1] / given[task].total() < limit, task


@pytest.mark.parametrize(("name", "subset"), [("train", "train2017"), ("dev", "val2017"), ("test", "val2017")])
def test_vsr_has_the_public_schema_and_right_labels(
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
        assert row["label"] == synthetic_answers.is_true(row["caption"], captions[int(row["image"].split(".")[0])])
        assert f" is {row['relation']} the " in row["caption"]
        assert bool(row["vote_true_validator_id"]) == bool(row["label"]) != bool(row["vote_false_validator_id"])
    assert 0.25 < sum(row["label"] for row in rows) / len(rows) < 0.75


@pytest.mark.parametrize("split", ["train", "val"])
def test_aokvqa_has_the_public_schema_and_right_choices(root: Path, captions: dict[int, str], split: str) -> None:
    rows = load(root, f"A-OKVQA/aokvqa_v1p0_{split}.json")
    for row in rows:
        assert row.keys() == {
            *("split", "image_id", "question_id", "question", "choices", "correct_choice_idx"),
            *("direct_answers", "difficult_direct_answer", "rationales"),
        }
        assert row["split"] == split and re.fullmatch(r"\w{22}", row["question_id"])
        assert len(row["choices"]) == len(set(row["choices"])) == 4
        (place,) = re.fullmatch(r"Which object is ([a-z-]+)\?", row["question"]).groups()
        right = synthetic_answers.object_at(place, captions[row["image_id"]])
        assert row["choices"][row["correct_choice_idx"]] == right
        assert row["direct_answers"] == [right] * 10
        assert (root / f"A-OKVQA/{split}2017/{row['image_id']:012}.jpg").is_file()
    assert len({row["question_id"] for row in rows}) == len(rows)
    right_places = Counter(row["correct_choice_idx"] for row in rows)
    assert max(right_places.values()) < 0.36 * len(rows)


@pytest.mark.parametrize("split", ["train", "val"])
def test_refcoco_has_mdetrs_schema_and_right_phrases(root: Path, captions: dict[int, str], split: str) -> None:
    content = load(root, f"ref/annotations/finetune_refcoco_{split}.json")
    assert content.keys() == {"info", "licenses", "images", "annotations", "categories"}
    endings = Counter()
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        assert image.keys() == {*("file_name", "height", "width", "id", "original_id", "caption", "dataset_name")}
        assert annotation.keys() >= {*("area", "iscrowd", "image_id", "category_id", "id", "bbox", "original_id")}
        assert annotation["image_id"] == image["id"]
        x, y, width, height = annotation["bbox"]
        assert (width, height) == (12, 12) and annotation["area"] == width * height
        things = synthetic_answers.objects_of(captions[image["original_id"]])
        assert image["caption"] == " ".join(things[x // 12, y // 12])
        assert annotation["tokens_positive"] == [[0, len(image["caption"])]]
        with Image.open(root / "VQA/train2014" / image["file_name"]) as picture:
            assert (picture.width, picture.height) == (image["width"], image["height"])
            endings[picture.format] += 1
    assert endings["JPEG"] > endings["PNG"] > 0


def test_shards_hold_pairs_of_jpeg_or_png_and_text(root: Path) -> None:
    with tarfile.open(root / "captions/00000.tar") as tar:
        members = tar.getmembers()
        assert all(member.mtime == 0 and member.uid == 0 and not member.uname for member in members)
    assert [member.name for member in members[6:12]] == [
        *("000000003.jpg", "000000003.txt", "000000004.png", "000000004.txt", "000000005.jpg", "000000005.txt")
    ]
    assert len(members) == 2 * SIZE.scenes


def test_jpegs_keep_their_colors(root: Path) -> None:
    with Image.open(root / "VQA/train2014/COCO_train2014_000000000001.jpg") as picture:
        assert picture.format == "JPEG" and picture.mode == "RGB" and picture.size == (36, 36)
        assert [component[1:3] for component in picture.layer] == [(1, 1)] * 3, "4:4:4, no subsampling"


def test_held_out_scenes_are_not_those_of_training(captions: dict[int, str]) -> None:
    train = {text for number, text in captions.items() if number < FIRST_HELD_OUT_ID}
    held_out = {text for number, text in captions.items() if number >= FIRST_HELD_OUT_ID}
    assert not train & held_out


def test_every_source_reads_the_files_and_samples_are_short(root: Path) -> None:
    tokenizer = Tokenizer(root / "tokenizer", CHATS["phi3"])
    template = Template(tokenizer, image_tokens=9, max_text_tokens=64, system_message=SYSTEM_MESSAGE)
    for source in ("vqav2", "vsr", "aokvqa", "refcoco"):
        for split in ("train", "val"):
            for conversation in SOURCES[source](root, split):
                assert isinstance(conversation.image, Path) and conversation.image.is_file()
                sample = template.render_conversation(conversation)
                assert sample is not None
                assert len(sample.token_ids) - 9 <= 28, [tokenizer.token(number) for number in sample.token_ids]
                assert len(sample.token_ids) - 9 <= 20 or source == "aokvqa"


def test_every_source_reads_its_added_set(root: Path) -> None:
    """The tokenizer was not trained on these texts; what it lacks it spells in bytes, never as <unk>."""
    tokenizer = Tokenizer(root / "tokenizer", CHATS["phi3"])
    template = Template(tokenizer, image_tokens=9, max_text_tokens=512, system_message=SYSTEM_MESSAGE)
    names = {"gqa": 2.5, "ocrvqa": 5, "scienceqa": 1, "refcoco+": 2, "refcocog": 2, "visualgenome": 4, "llava150k": 0.4}
    for split in SPLITS:
        opened = open_sources(root, with_split(names, split), split)
        for name, rows in opened.items():
            assert len(rows) >= 20 * names[name], name
            without_image = 0
            for conversation in rows:
                without_image += conversation.image is None
                assert conversation.image is None or conversation.image.is_file()
                sample = template.render_conversation(conversation)
                assert sample is not None and len(sample.token_ids) - 9 < 256
                assert "<unk>" not in {tokenizer.token(number) for number in sample.token_ids}
                for turn in conversation.turns:
                    ids = tokenizer.encode(f"<|assistant|>{turn.response}")
                    assert tokenizer.decode(ids) == turn.response
            assert (without_image > 0) == (name == "scienceqa")
    assert set(SOURCES) == {*names, "vqav2", "vsr", "aokvqa", "refcoco"}, "all eleven are drawn"


def test_the_added_sets_leave_the_first_four_as_they_were(tmp_path: Path) -> None:
    """Digests taken before anything was added: the demo's figures rest on these files."""
    make_dataset(tmp_path / "data", DatasetSize(scenes=10, held_out=5, seed=1), lambda done: None)
    found = {name: digest[:16] for name, digest in digests(tmp_path / "data").items() if name in FIRST_FOUR}
    assert found == FIRST_FOUR


def test_changed_or_missing_files_are_noticed_and_drawn_again(tmp_path: Path) -> None:
    size = DatasetSize(scenes=10, held_out=5, seed=1)
    folder = tmp_path / "data"
    counts = make_dataset(folder, size, lambda done: None)
    whole = digests(folder)
    assert is_complete(folder, size) and counts["train/captions"] == 10
    manifest = json.loads((folder / MANIFEST).read_text())
    for version in (manifest["version"] - 1, manifest["version"]):  # drawn by an earlier version: drawn again
        (folder / MANIFEST).write_text(json.dumps({**manifest, "version": version}, indent=1) + "\n")
        assert is_complete(folder, size) == (version == manifest["version"])
    (folder / "encoder").mkdir()
    (folder / "encoder/keep").write_text("made from these data by another tool")
    next((folder / "VQA/train2014").iterdir()).unlink()
    assert not is_complete(folder, size)
    make_dataset(folder, size, lambda done: None)
    assert is_complete(folder, size) and (folder / "encoder/keep").exists()
    with (folder / "vsr/train-random.jsonl").open("a") as file:
        file.write("{}\n")
    assert not is_complete(folder, size)
    make_dataset(folder, size, lambda done: None)
    assert {name: digest for name, digest in digests(folder).items() if name != "encoder/keep"} == whole


def test_an_interrupted_drawing_is_noticed_and_done_again(tmp_path: Path) -> None:
    size, folder = DatasetSize(scenes=10, held_out=5, seed=1), tmp_path / "data"

    def interrupt(done: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(folder, size, interrupt)
    assert was_interrupted(folder) and not is_complete(folder, size)
    make_dataset(folder, size, lambda done: None)
    assert is_complete(folder, size) and not was_interrupted(folder)
    make_dataset(tmp_path / "undisturbed", size, lambda done: None)
    assert digests(folder) == digests(tmp_path / "undisturbed")


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "VQA").mkdir()
    (tmp_path / "VQA/precious").write_text("coco")
    with pytest.raises(DataError, match="holds other files"):
        make_dataset(tmp_path, DatasetSize(scenes=10, held_out=5), lambda done: None)
    (tmp_path / MANIFEST).write_text('{"name": "an app"}')
    with pytest.raises(DataError, match="not a manifest of make_data"):
        is_complete(tmp_path, DatasetSize(scenes=10, held_out=5))
    assert (tmp_path / "VQA/precious").read_text() == "coco"


def test_a_larger_pool_begins_with_the_smaller_one(root: Path, tmp_path: Path) -> None:
    make_dataset(tmp_path / "small", DatasetSize(scenes=20, held_out=10, seed=SIZE.seed), lambda done: None)
    for picture in (tmp_path / "small/VQA/train2014").iterdir():
        assert picture.read_bytes() == (root / "VQA/train2014" / picture.name).read_bytes()


@pytest.mark.parametrize("wrong", [{"scenes": 0}, {"scenes": 500_001}, {"held_out": 0}, {"seed": -1}])
def test_sizes_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(DataError, match="scenes must lie in"):
        DatasetSize(**wrong)
