"""Readers of the public benchmarks' files, on made-up files of every format."""

from pathlib import Path

import pytest
from public_files import HUB_FILES, NUM_QUESTIONS, TABLES, encoded, png, write_parquet, write_tables, write_tsv

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmarks import files
from aki_megatron.evaluate.benchmarks.files import load_questions
from aki_megatron.evaluate.benchmarks.mmbench import finish
from aki_megatron.evaluate.benchmarks.question import BenchmarkQuestion
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS, find_benchmark
from aki_megatron.evaluate.benchmarks.score import PAPER_COLUMNS
from aki_megatron.evaluate.benchmarks.tsv import md5_of


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tables(tmp_path_factory.mktemp("tsv"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parquet(tmp_path_factory.mktemp("hub"))


def read(name: str, *roots: Path) -> dict[str, BenchmarkQuestion]:
    return {question.id: question for question in load_questions(BENCHMARKS[name], roots).questions}


def test_the_registry_has_the_papers_columns() -> None:
    assert [column for benchmark in BENCHMARKS.values() for column in benchmark.columns] == list(PAPER_COLUMNS)
    assert find_benchmark("mme") is BENCHMARKS["MME"]
    with pytest.raises(DataError, match="no benchmark 'VQA'; known are MME"):
        find_benchmark("VQA")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_formats_are_read_with_their_images(name: str, tables: Path, hub: Path) -> None:
    for root in (tables, hub):
        found = load_questions(BENCHMARKS[name], [root])
        assert len(found.questions) == NUM_QUESTIONS[name]
        assert all(question.benchmark == name and question.answer for question in found.questions)
        assert all(image.read().startswith(b"\x89PNG") for question in found.questions for image in question.images)
        assert all(question.images for question in found.questions)
        assert found.notes  # made-up files are not the public ones, and that is said


def test_a_table_keeps_line_breaks_tabs_hints_and_shared_images(tables: Path) -> None:
    first, rotated = read("MMBench", tables).values()
    assert (first.text, first.hint, first.group, rotated.group) == ("Which\tis it?", "look\nup", "7", "7")
    # a missing option, and one that pandas reads as missing, are no options
    assert (first.choices, rotated.choices) == ({"A": "cat", "B": "dog", "C": "fox"}, {"A": "dog", "B": "cat"})
    assert rotated.images[0].read() == first.images[0].read() == png()


def test_several_images_stay_in_order(tables: Path) -> None:
    question = read("MMMU", tables)["1"]
    assert [image.read() for image in question.images] == [png("red"), png("blue")]


def test_details_of_the_parquet_files(hub: Path) -> None:
    assert list(read("MME", hub)) == ["color/1.png#1", "color/1.png#2"]
    assert read("MMBench", hub)["7"].choices == {"A": "cat", "B": "dog"}
    choice, open_question = read("MMMU", hub)["validation_Art_1"], read("MMMU", hub)["dev_Math_1"]
    assert (choice.choices, len(choice.images), choice.l2_category) == ({"A": "cat", "B": "dog"}, 2, "Art & Design")
    assert (open_question.choices, len(open_question.images), open_question.split) == ({}, 1, "dev")
    number, letter = read("MathVista", hub).values()
    assert (letter.details["answer_option"], number.details["skills"]) == ("B", ["arithmetic reasoning"])
    real = read("RealWorldQA", hub)["0"]
    assert (real.text, real.choices) == ("Where to?", {"A": "cat", "B": "dog", "C": "fox"})
    assert read("POPE", hub)["1"].answer == "Yes"
    assert read("SEED-Bench", hub)["image1"].category == "Visual Reasoning"


def test_a_table_comes_first_and_a_cache_of_the_hub_is_found(tables: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--lmms-lab--POPE" / "snapshots" / "abc"
    write_parquet(tmp_path / "all")
    (tmp_path / "all/lmms-lab/POPE").rename(snapshot.parent.parent)
    (snapshot.parent.parent / "data").rename(snapshot.parent.parent / "x")
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "x").rename(snapshot / "data")
    assert list(read("POPE", tmp_path)) == ["1"]
    assert list(read("POPE", tables, tmp_path)) == ["0"]
    assert list(read("POPE", tables / "POPE.tsv")) == ["0"]


def test_a_missing_file_says_where_to_get_it_and_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_questions(BENCHMARKS["MMBench"], [tmp_path / "one", tmp_path / "two"])
    message = str(caught.value)
    assert "utils/benchmarks/MMBench/MMBench_DEV_EN.tsv" in message
    assert "https://huggingface.co/datasets/lmms-lab/MMBench" in message
    assert all(f"{tmp_path}/{root}/MMBench_DEV_EN.tsv" in message for root in ("one", "two"))
    assert "nothing is downloaded" in message


def test_a_table_of_two_parts_needs_both(tmp_path: Path) -> None:
    write_tsv(tmp_path / "CV-Bench-2D.tsv", TABLES["CV-Bench-2D"])
    with pytest.raises(DataError, match=r"lacks CV-Bench-3D.tsv. Get https://\S+/VLMEval/CV-Bench-3D.tsv"):
        read("CV-Bench", tmp_path)


def test_the_md5_is_checked_and_named(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = md5_of(tables / "MME.tsv")
    found = load_questions(BENCHMARKS["MME"], [tables])
    assert f"MD5 {md5}, not VLMEvalKit's MME" in found.source and "b36b43c3f0" in found.notes[0]
    monkeypatch.setattr(files, "md5_of", lambda path: "b36b43c3f09801f5d368627fb92187c3")
    found = load_questions(BENCHMARKS["MME"], [tables])
    assert "VLMEvalKit's MME)" in found.source and "not " not in found.source and found.notes == ()
    monkeypatch.setattr(files, "md5_of", lambda path: "30c05be8f2f347a50be25aa067248184")
    with pytest.raises(DataError, match="is MMBench_DEV_EN_V11"):
        load_questions(BENCHMARKS["MMBench"], [tables])


def test_the_old_mmbench_file_is_refused(tables: Path) -> None:
    questions = load_questions(BENCHMARKS["MMBench"], [tables]).questions
    with pytest.raises(DataError, match="July 2023"):
        finish(questions[:1] * 4377, tables)


ROW = TABLES["POPE"][0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW, ROW], "question '0' is there twice"),
        ([{**ROW, "image": "99"}], "its image is that of row '99', which has none"),
        ([{**ROW, "image": "['" + encoded()}], "is no base64"),
        ([{**ROW, "image": "[" + encoded() + ", ]"}], "a list of images is damaged"),
        ([{name: value for name, value in ROW.items() if name != "answer"}], "row 1 has no column answer"),
        ([{name: value for name, value in ROW.items() if name != "question"}], "no table of VLMEvalKit"),
    ],
)
def test_damaged_tables(rows: list[dict], message: str, tmp_path: Path) -> None:
    write_tsv(tmp_path / "POPE.tsv", rows)
    with pytest.raises(DataError, match=message):
        for question in read("POPE", tmp_path).values():
            question.images[0].read()


def test_ragged_and_empty_tables_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "POPE.tsv"
    write_tsv(path, [ROW])
    path.write_text(path.read_text() + "1\tcut")
    with pytest.raises(DataError, match="row 2 has 2 cells, the header 5"):
        read("POPE", tmp_path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="no table of VLMEvalKit"):
        read("POPE", tmp_path)
    path.write_text("index\tquestion\tanswer\tcategory\n")
    with pytest.raises(DataError, match="holds no question of POPE"):
        read("POPE", tmp_path)


def test_missing_images_are_counted_and_do_not_stop_the_reading(tmp_path: Path) -> None:
    write_tsv(tmp_path / "POPE.tsv", [ROW, {**ROW, "index": 1, "image": ""}])
    found = load_questions(BENCHMARKS["POPE"], [tmp_path])
    assert len(found.questions) == 2 and "1 questions have no image (first: 1)." in found.notes


def test_images_in_files_of_their_own(tmp_path: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "image"} for row in TABLES["MME"]]
    write_tsv(tmp_path / "MME_local.tsv", rows)
    (tmp_path / "images/MME").mkdir(parents=True)
    question = read("MME", tmp_path)["1"]
    with pytest.raises(DataError, match=r"its image is missing; looked for .*images/MME/a.png"):
        question.images[0].read()
    (tmp_path / "images/MME/a.png").write_bytes(png())
    assert question.images[0].read() == png()


def test_no_parquet_file_and_a_path_instead_of_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "lmms-lab/POPE/data/test-00000-of-00001.parquet"
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="is no parquet file"):
        read("POPE", tmp_path)
    monkeypatch.setitem(HUB_FILES, name, [{**HUB_FILES[name][0], "image": {"bytes": None, "path": "x.png"}}])
    write_parquet(tmp_path)
    with pytest.raises(DataError, match="image holds no image but .*x.png"):
        read("POPE", tmp_path)["1"].images[0].read()


def test_options_that_are_no_list_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "MMMU/MMMU/Art/validation-00000-of-00001.parquet"
    monkeypatch.setitem(HUB_FILES, name, [{**HUB_FILES[name][0], "options": "['cat'"}])
    with pytest.raises(DataError, match=r"row 0: options .* are no list"):
        read("MMMU", write_parquet(tmp_path))
