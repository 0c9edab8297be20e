"""The extra datasets on disk: the originals' schemas, answers that are correct for the scene, images that show it."""

import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import reference_answers as answers
from PIL import Image

from aki_megatron.data.shards import CaptionDataset
from aki_megatron.synthetic.book_covers import sample_page
from aki_megatron.synthetic.dataset import DatasetSize, write_dataset
from aki_megatron.synthetic.extra_datasets import EXTRA_DATASETS
from aki_megatron.synthetic.formats import blip3_ocr, gqa, llava150k, ocrvqa, refcoco, scienceqa
from aki_megatron.synthetic.questions import scene_caption
from aki_megatron.synthetic.scene_pools import SyntheticExample, own_scenes, pool_size, shared_scenes
from aki_megatron.synthetic.scenes import CELL_NAMES, render_scene

SIZE = DatasetSize(train_scenes=400, val_scenes=100, seed=5)
COUNT = 20
LOCATION_WORDS = {*CELL_NAMES, "left", "right", "above", "below", "top", "bottom", "center", "middle"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extra_datasets") / "data"
    write_dataset(folder, SIZE, lambda done: None)
    return folder


def load(root: Path, name: str):
    return json.loads((root / name).read_text())


def examples(name: str, split: str) -> list[SyntheticExample]:
    size = pool_size(split, SIZE.train_scenes, SIZE.val_scenes)
    return list(EXTRA_DATASETS[name].scenes(SIZE.seed, name, split, size))


def shows(file: Path | bytes, one: SyntheticExample) -> bool:
    """Return whether an image file is the rendered scene: to the pixel as PNG, nearly as JPEG."""
    with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as image:
        assert image.mode == "RGB"
        difference = np.abs(np.asarray(image).astype(int) - render_scene(one.scene, one.image_rng).astype(int))
        return difference.max() == 0 if image.format == "PNG" else difference.mean() < 4


def test_a_pool_is_a_fraction_of_the_scenes_and_never_larger() -> None:
    assert [pool_size("train", train_scenes, 5) for train_scenes in (5, 100, 400, 20_000)] == [5, 20, 20, 1000]
    assert [pool_size("val", 5, val_scenes) for val_scenes in (5, 100, 2000)] == [5, 20, 200]
    assert pool_size("test", 5, 2000) == 200


def test_no_two_datasets_have_a_scene_of_their_own_in_common() -> None:
    first = [
        next(iter(EXTRA_DATASETS[name].scenes(5, name, split, 1))).scene
        for name in ("gqa", "scienceqa", "vg", "ocr", "ocrvqa")
        for split in EXTRA_DATASETS[name].splits
    ]
    captions = {scene_caption(scene) for scene in [*first, next(iter(shared_scenes(5, "x", "train", 1))).scene]}
    assert len(captions) == len(first) + 1


@pytest.mark.parametrize("split", ["train", "val"])
def test_gqa_has_the_public_schema_and_correct_answers(root: Path, split: str) -> None:
    entries = load(root, f"GQA/{split}_balanced_questions.json")
    scenes = examples("gqa", split)
    images = sorted({entry["imageId"] for entry in entries.values()})
    files = [root / f"GQA/images/{image}.jpg" for image in images]
    assert len(files) == COUNT and all(shows(file, one) for file, one in zip(files, scenes, strict=True))
    assert not shows(files[0], examples("gqa", split)[1]), "another scene is recognized as different"
    kinds: Counter[str] = Counter()
    for question_id, entry in entries.items():
        assert entry.keys() == {
            *("semantic", "entailed", "equivalent", "question", "imageId", "isBalanced", "groups", "answer"),
            *("semanticStr", "annotations", "types", "fullAnswer"),
        }
        assert question_id.isdigit() and entry["imageId"].isdigit() and entry["isBalanced"] is True
        text = scene_caption(scenes[images.index(entry["imageId"])].scene)
        assert answers.gqa(entry["question"], text) == entry["answer"].replace("letter ", ""), entry
        start = entry["answer"] if entry["answer"] in ("yes", "no") else ""
        assert entry["fullAnswer"].lower().startswith(start) and entry["answer"] in entry["fullAnswer"].lower()
        kinds[entry["types"]["structural"]] += 1
        _check_program(entry, text)
    assert set(kinds) == {"query", "verify", "choose", "logical", "compare"}


def _check_program(entry: dict, text: str) -> None:
    """Check that steps depend on earlier ones and object ids are those of the objects that the words name."""
    objects, steps = answers.objects_of(text), entry["semantic"]
    for number, step in enumerate(steps):
        assert step.keys() == {"operation", "dependencies", "argument"}
        assert all(0 <= needed < number for needed in step["dependencies"])
        if step["operation"] == "select" and (match := re.fullmatch(r"([\w ]+) \((\d+)\)", step["argument"])):
            cell = int(match[2]) % 10
            assert objects[cell % 3, cell // 3][1] == match[1].removeprefix("letter ")
            assert match[2].startswith(entry["imageId"])
    assert entry["semanticStr"].count("->") == len(steps) - 1
    words = entry["question"].rstrip("?").split()
    for words_at, object_id in entry["annotations"]["question"].items():
        start, _, end = words_at.partition(":")
        named = words[int(start) : int(end or int(start) + 1)]
        assert named[-1] == objects[int(object_id) % 10 % 3, int(object_id) % 10 // 3][1]


def test_ocrvqa_has_the_public_schema_and_correct_answers(root: Path) -> None:
    books = load(root, "OCRVQA/dataset.json")
    scenes = [one for split in ocrvqa.SPLITS for one in examples("ocrvqa", split)]
    extensions = Counter()
    for (key, book), one in zip(books.items(), scenes, strict=True):
        assert book.keys() == {"imageURL", "questions", "answers", "title", "authorName", "genre", "split"}
        assert re.fullmatch(r"\d{9}[\dX]", key)
        assert sum((10 - at) * (10 if digit == "X" else int(digit)) for at, digit in enumerate(key)) % 11 == 0
        assert book["split"] == ocrvqa.SPLITS[one.split]
        extension = Path(book["imageURL"]).suffix
        extensions[extension] += 1
        assert shows(root / f"OCRVQA/images/{key}{extension}", one)
        title, author = answers.words_of(scene_caption(one.scene))
        (genre,) = [kind for _, kind in answers.objects_of(scene_caption(one.scene)).values() if len(kind) > 1]
        assert (book["title"], book["authorName"], book["genre"]) == (title, author, genre)
        for question, answer in zip(book["questions"], book["answers"], strict=True):
            asked = next((word for word in ("title", "author", "wrote", "genre", "type") if word in question), "")
            correct = {"title": title, "author": author, "wrote": author, "genre": genre, "type": genre, "": ""}[asked]
            assert answer == (correct or ("Yes" if f" {genre}" in question.replace("?", "") else "No")), question
        assert Counter(book["answers"]).keys() >= {"Yes", "No"}
    assert Counter(book["split"] for book in books.values()) == {1: COUNT, 2: COUNT, 3: COUNT}
    assert extensions[".jpg"] > extensions[".png"] > 0


def test_scienceqa_has_the_public_schema_and_correct_choices(root: Path) -> None:
    problems, splits = load(root, "ScienceQA/problems.json"), load(root, "ScienceQA/pid_splits.json")
    scenes = [one for split in ("train", "val", "test") for one in examples("scienceqa", split)]
    kinds = Counter()
    for (number, problem), one in zip(problems.items(), scenes, strict=True):
        assert problem.keys() == {
            *("question", "choices", "answer", "hint", "image", "task", "grade", "subject", "topic", "category"),
            *("skill", "lecture", "solution", "split"),
        }
        assert problem["split"] == one.split and number in splits[one.split]
        correct = problem["choices"][problem["answer"]]
        assert correct == answers.science(problem, scene_caption(one.scene)), problem
        assert 2 <= len(problem["choices"]) == len(set(problem["choices"])) <= 5
        assert problem["lecture"] and correct in problem["solution"]
        kinds[problem["image"], bool(problem["hint"])] += 1
        image = root / f"ScienceQA/images/{one.split}/{number}/image.png"
        assert image.exists() == (problem["image"] == "image.png")
        assert not image.exists() or shows(image, one)
    assert kinds.keys() == {("image.png", True), ("image.png", False), (None, True), (None, False)}
    assert splits["trainval"] == splits["train"] + splits["val"]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("dataset", ["refcoco+", "refcocog"])
def test_the_other_refcocos_have_mdetrs_schema_and_phrases_that_fit_one_object(
    root: Path, dataset: str, split: str
) -> None:
    content, plain = (load(root, f"ref/annotations/finetune_{name}_{split}.json") for name in (dataset, "refcoco"))
    assert content.keys() == plain.keys()
    texts = {one.index: scene_caption(one.scene) for one in examples(dataset, split)}
    for image, annotation in zip(content["images"], content["annotations"], strict=True):
        assert image.keys() == plain["images"][0].keys() and annotation.keys() == plain["annotations"][0].keys()
        assert image["dataset_name"] == dataset and annotation["image_id"] == image["id"]
        assert (root / "VQA/train2014" / image["file_name"]).is_file()
        text = texts[image["original_id"] - (1 if split == "train" else 500_001)]
        x, y, _, _ = annotation["bbox"]
        phrase = image["caption"]
        if dataset == "refcoco+":
            assert answers.described_cells(phrase, text) == [(x // 12, y // 12)], phrase
            assert not LOCATION_WORDS & set(re.split(r"[ -]", phrase))
        else:
            assert answers.expression_cell(phrase, text) == (x // 12, y // 12), phrase
        assert annotation["tokens_positive"] == [[0, len(phrase)]]
    words = [len(image["caption"].split()) for image in content["images"]]
    assert 2 <= np.mean(words) < 4 if dataset == "refcoco+" else np.mean(words) > 7


def test_visual_genome_has_the_public_layout_and_true_regions(root: Path) -> None:
    regions, images = load(root, "VisualGenome/region_descriptions.json"), load(root, "VisualGenome/image_data.json")
    seen = []
    for entry, image, one in zip(regions, images, examples("vg", "train"), strict=True):
        assert entry.keys() == {"id", "regions"} and entry["id"] == image["image_id"]
        assert image.keys() == {"width", "url", "height", "image_id", "coco_id", "flickr_id"}
        assert (image["width"], image["height"]) == (36, 36)
        assert shows(root / f"VisualGenome/images/{entry['id']}.jpg", one)
        for region in entry["regions"]:
            assert region.keys() == {"region_id", "width", "height", "image_id", "phrase", "y", "x"}
            assert region["image_id"] == entry["id"]
            seen.append(region["region_id"])
            (cells,) = answers.region_cells(region["phrase"], scene_caption(one.scene))
            left, top = min(x for x, _ in cells), min(y for _, y in cells)
            right, bottom = max(x for x, _ in cells) + 1, max(y for _, y in cells) + 1
            box = tuple(12 * side for side in (left, top, right - left, bottom - top))
            assert box == tuple(region[side] for side in ("x", "y", "width", "height")), region
    assert len(set(seen)) == len(seen) >= 3 * COUNT


def test_llava_has_the_public_schema_and_true_replies(root: Path) -> None:
    entries = load(root, "llava/llava_instruct_150k.json")
    rounds, image_first = Counter(), Counter()
    for entry, one in zip(entries, examples("llava", "train"), strict=True):
        assert entry.keys() == {"id", "image", "conversations"}
        assert entry["image"] == f"{entry['id']}.jpg" and (root / "A-OKVQA/train2017" / entry["image"]).is_file()
        turns = entry["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert ["<image>" in turn["value"] for turn in turns] == [True] + [False] * (len(turns) - 1)
        image_first[turns[0]["value"].startswith("<image>\n")] += 1
        rounds[len(turns) // 2] += 1
        for human, gpt in zip(turns[::2], turns[1::2], strict=True):
            asked = human["value"].removeprefix("<image>\n").removesuffix("\n<image>")
            assert "<image>" not in asked
            assert answers.is_reply_true(asked, gpt["value"], scene_caption(one.scene)), (asked, gpt["value"])
    assert rounds[1] and max(rounds) > 1


def test_many_sampled_texts_are_correct() -> None:
    """Check the rules of every dataset over far more scenes than the files above hold."""
    yes_no: Counter[str] = Counter()
    for one in own_scenes(11, "gqa", "train", 1500):
        text = scene_caption(one.scene)
        for asked in gqa.sample_questions(one.scene, one.text_rng):
            assert answers.gqa(asked.text, text) == asked.answer.replace("letter ", "")
            yes_no[f"{asked.structural_type} {asked.answer}"] += asked.answer in ("yes", "no")
        for question, reply in llava150k.sample_rounds(one.scene, one.text_rng):
            assert answers.is_reply_true(question, reply, text), (question, reply, text)
        for item in one.scene.objects:
            cell = (item.column, item.row)
            phrase = refcoco.appearance_phrase(one.scene, item, one.text_rng)
            assert answers.described_cells(phrase, text) == [cell]
            phrase = refcoco.relational_phrase(one.scene, item, one.text_rng)
            assert answers.expression_cell(phrase, text) == cell
        for kind in scienceqa.PROBLEM_KINDS:
            problem = kind(one.scene, one.text_rng)
            fields = {"question": problem.question, "hint": problem.hint}
            image = "image.png" if kind in scienceqa.KINDS_WITH_IMAGE else None
            assert answers.science({**fields, "image": image}, text) == problem.choices[problem.answer]
    for kind in ("verify", "logical"):
        assert 0.4 < yes_no[f"{kind} yes"] / (yes_no[f"{kind} yes"] + yes_no[f"{kind} no"]) < 0.6


def test_ocr_tars_hold_twelve_captions_of_the_words(root: Path) -> None:
    for split, folder in blip3_ocr.FOLDERS.items():
        dataset = CaptionDataset([f"{folder}/00000.tar"], root)
        scenes = examples("ocr", split)
        assert len(dataset) == len(scenes) == COUNT
        for number, one in enumerate(scenes):
            sample = dataset.caption(number)
            assert shows(sample.images[0], one)
            found = json.loads(sample.text)
            assert [(entry["granularity"], entry["include_datacomp_raw_cap"]) for entry in found] == [
                (level, raw) for raw in (False, True) for level in range(6)
            ]
            words = answers.words_of(scene_caption(one.scene))
            assert words, "there is a word in every image"
            for plain, entry in zip([*found[:6], *found[:6]], found, strict=True):
                assert re.findall(r'"(\w+)"', entry["text"]) == words
                assert entry["text"].endswith(plain["text"])
            assert found[0]["text"] == "The image contains " + ", ".join(f'the text "{word}"' for word in words)


def test_ocr_granularities_give_locations() -> None:
    for one in own_scenes(3, "ocr", "train", 300, sample_page):
        texts = [entry["text"] for entry in blip3_ocr.ocr_captions(one.scene)]
        objects = answers.objects_of(scene_caption(one.scene))
        boxes = re.findall(r'<ocr>"(\w+)"</ocr><bbox>\[([\d.]+), ([\d.]+)\]\[([\d.]+), ([\d.]+)\]</bbox>', texts[5])
        assert boxes
        for word, *corners in boxes:
            left, top, right, bottom = (round(float(corner) * 3) for corner in corners)
            assert bottom == top + 1 and right - left == len(word)
            assert "".join(objects[x, top][1] for x in range(left, right)) == word
            fine = f'"{word}" starts at [{corners[0]}, {corners[1]}] and extends upto [{corners[2]}, {corners[3]}]'
            assert fine in texts[4]
            row, column = ("top", "", "bottom")[top], ("left", "", "right")[min(2, (left + right) // 2)]
            if len(word) != 2:  # the middle of two letters lies between two columns
                location = f"{row} {column} corner" if row and column else row or column or "center"
                assert f'the text "{word}" located at the {location}' in texts[1]
            down = {0: "1/6", 1: "1/2", 2: "5/6"}[top]
            assert f'"{word}" located at {down} of the image from top to bottom and ' in texts[2]
        assert not re.search(r"\d\.\d\d", texts[3]) and re.search(r"\d\.\d\d\d", texts[4])
