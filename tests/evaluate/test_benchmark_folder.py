"""Folders of predictions: reading, scoring, report, export, the commands of tools/evaluate.py."""

import csv
import importlib.util
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import ModuleType

import openpyxl
import pytest
from public_files import write_tables

from aki_megatron.errors import DataError
from aki_megatron.evaluate.benchmark_folder import (
    QuestionsInfo,
    begin_benchmark,
    folder_predictions,
    load_scores,
    score_folder,
)
from aki_megatron.evaluate.benchmark_report import main_table, to_html, to_markdown, write_reports
from aki_megatron.evaluate.benchmarks.benchmark import ScoringOptions
from aki_megatron.evaluate.benchmarks.files import load_questions
from aki_megatron.evaluate.benchmarks.question import Prediction, append_predictions, read_predictions
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS
from aki_megatron.evaluate.benchmarks.score import PAPER_COLUMNS
from aki_megatron.evaluate.export import MAX_XLSX_CELL, export_lmms_eval, export_vlmevalkit, safe_name
from aki_megatron.evaluate.judges.heuristic import HeuristicJudge
from aki_megatron.evaluate.published import DOUBTS, PUBLISHED

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2026, 11, 28, 9, 30)
HEURISTIC = ScoringOptions(judge=HeuristicJudge())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Predictions on all benchmarks' made-up tables; every reply is the reference answer."""
    tables, out = write_tables(tmp_path / "tables"), tmp_path / "out"
    for name, benchmark in BENCHMARKS.items():
        found = load_questions(benchmark, [tables])
        QuestionsInfo(name, found.source, len(found.questions), "table6", "m", found.notes).save(out)
        lines = [Prediction(question, question.answer, profile="table6") for question in found.questions]
        append_predictions(out / name / "predictions.jsonl", lines)
    return out


def edit_first(path: Path, **changes: object) -> None:
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | changes), *others, ""]))


def test_predictions_are_read_as_they_were_written(folder: Path) -> None:
    prediction = read_predictions(folder / "MathVista")[0]
    assert prediction.question.details["skills"] == ["arithmetic reasoning"] and prediction.profile == "table6"
    assert list(folder_predictions(folder)) == list(BENCHMARKS)


def test_a_line_cut_short_is_left_out_and_the_file_continued(folder: Path) -> None:
    path = folder / "MME/predictions.jsonl"
    first, second = read_predictions(path)
    content = path.read_bytes()
    # in the middle, after the question's own brace, in a text that holds a brace
    start = content.index(b"\n") + 1
    for cut in (content[:-20], content[: content.rindex(b"}", start, -3) + 1], content[:-20] + b"}"):
        path.write_bytes(cut)
        assert read_predictions(path) == [first]
    append_predictions(path, [second])
    assert read_predictions(path) == [first, second]


def test_a_benchmark_is_begun_once_and_continued_with_what_is_not_answered(tmp_path: Path) -> None:
    found = load_questions(BENCHMARKS["MME"], [write_tables(tmp_path / "tables")])
    out = tmp_path / "out"
    assert begin_benchmark(out, found, profile="table6", model="m") == list(found.questions)
    append_predictions(out / "MME/predictions-0.jsonl", [Prediction(found.questions[0], "Yes")])
    assert begin_benchmark(out, found, profile="table6", model="m") == [found.questions[1]]
    append_predictions(out / "MME/predictions-1.jsonl", [Prediction(found.questions[1], "", error="no image")])
    assert begin_benchmark(out, found, profile="table6", model="m") == []
    with pytest.raises(DataError, match="profile was 'table6', now 'vlmevalkit'; model was 'm', now 'n'"):
        begin_benchmark(out, found, profile="vlmevalkit", model="n")


def test_several_workers_and_repeated_lines(folder: Path) -> None:
    first, second = read_predictions(folder / "MME")
    append_predictions(folder / "MME/predictions-1.jsonl", [second])
    assert read_predictions(folder / "MME") == [second, first]
    append_predictions(folder / "MME/predictions-1.jsonl", [replace(first, reply="other")])
    with pytest.raises(DataError, match=r"predictions.jsonl:1: question 1 of MME has two different replies"):
        read_predictions(folder / "MME")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "no JSON object"),
        ("nonsense}", "no JSON object"),
        ("{}", "no prediction"),
        (
            '{"question": {"benchmark": "MME", "id": 1, "text": "", "answer": ""}, "reply": ""}',
            "question.id is no text",
        ),
        ('{"question": {"benchmark": "MME", "id": "", "text": "", "answer": ""}, "reply": ""}', "has no id"),
        ('{"question": {"benchmark": "MME", "id": "1", "text": "", "answer": ""}, "reply": 5}', "reply is no text"),
        (
            '{"question": {"benchmark": "VQA", "id": "1", "text": "", "answer": ""}, "reply": ""}',
            "known benchmarks are",
        ),
    ],
)
def test_lines_of_another_form_are_named(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text(line + "\n\n")
    with pytest.raises(DataError, match=message):
        folder_predictions(tmp_path)


def test_folders_without_predictions_or_scores(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no predictions.jsonl"):
        folder_predictions(tmp_path)
    with pytest.raises(DataError, match=r"evaluate.py score"):
        load_scores(tmp_path)
    (tmp_path / "scores.json").write_text("[{}]")
    with pytest.raises(DataError, match="remove it and score again"):
        load_scores(tmp_path)
    (tmp_path / "MME").mkdir()
    (tmp_path / "MME/questions.json").write_text('{"x": 1}')
    with pytest.raises(DataError, match=r"questions.json is not what"):
        QuestionsInfo.load(tmp_path, "MME")


def test_scores_are_saved_and_some_can_be_scored_again(folder: Path) -> None:
    scores = score_folder(folder, HEURISTIC)
    assert load_scores(folder) == scores and [score.benchmark for score in scores] == list(BENCHMARKS)
    assert all(score.is_complete and score.rules and score.parser and "MD5" in score.source for score in scores)
    again = score_folder(folder, ScoringOptions(mmmu_parser="official"), ["mmmu"])
    assert "official" in again[4].parser and again[:4] == scores[:4] and again[5:] == scores[5:]
    with pytest.raises(DataError, match="no benchmark 'x'"):
        score_folder(folder, HEURISTIC, ["x"])


def test_what_is_incomplete_or_broken_is_marked(folder: Path) -> None:
    edit_first(folder / "POPE/predictions.jsonl", reply="", error="its image is missing")
    path = folder / "RealWorldQA/questions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_questions": 5}))
    scores = {score.benchmark: score for score in score_folder(folder, HEURISTIC)}
    assert scores["POPE"].num_errors == 1 and "could not be asked" in " ".join(scores["POPE"].notes)
    assert not scores["RealWorldQA"].is_complete and "Of 1 of 5 questions." in scores["RealWorldQA"].notes
    row = dict(
        zip(
            main_table({"m": list(scores.values())}).header,
            main_table({"m": list(scores.values())}).rows[0],
            strict=True,
        )
    )
    assert (row["RWQA"], row["POPE"], row["SEED"]) == ("100.0*", "0.0*", "100.0")
    assert (row["LLaVA"], row["MM-Vet"], row["MathV"]) == ("-", "-", "-")  # a heuristic is no column


def test_the_report_has_our_rows_the_published_ones_and_every_condition(folder: Path) -> None:
    edit_first(folder / "MM-Vet/predictions.jsonl", reply="<script>|x|")
    scores = {"ours <b>": score_folder(folder, HEURISTIC)}
    paths = write_reports(folder, scores)
    assert [path.name for path in paths] == ["report.md", "report.html", "report.json"]
    markdown, page = to_markdown(scores), to_html(scores)
    for text in (markdown, page):
        assert "AKI-4B (v1), published" in text and "73.1?" in text and "VLMEvalKit mar2025 (0de60d7)" in text
        assert "offline heuristic (word overlap)" in text and "not a column of the papers" in text
        assert "option letter, then option text" in text and "ours <b>" not in text and "ours &lt;b" in text
        assert "none (exact matching)" in text and "MMMU dev" in text and "MME by subtask" in text
    document = json.loads(paths[2].read_text())
    assert document["columns"] == list(PAPER_COLUMNS) and len(document["models"]["ours <b>"]) == len(BENCHMARKS)
    assert document["published"][0]["name"] == "AKI-4B (v1)"


def test_published_rows_are_whole_and_doubts_name_them() -> None:
    assert all(len(row.columns) == len(PAPER_COLUMNS) for row in PUBLISHED)
    names = {row.name for row in PUBLISHED}
    assert len(names) == len(PUBLISHED)
    assert all(row in names and column in PAPER_COLUMNS for row, column in DOUBTS)


@pytest.mark.parametrize("file_format", ["xlsx", "tsv", "json"])
def test_export_for_vlmevalkit(folder: Path, tmp_path: Path, file_format: str) -> None:
    edit_first(folder / "MME/predictions.jsonl", reply="=1+1\x01\tyes")
    edit_first(folder / "POPE/predictions.jsonl", reply="y" * (MAX_XLSX_CELL + 1))
    exported = export_vlmevalkit(
        folder_predictions(folder), tmp_path / "kit", model="org/my model", now=NOW, file_format=file_format
    )
    place = tmp_path / "kit/org__my__model/T20261128-093000"
    assert all(path.parent == place for path in exported.paths) and len(exported.paths) == 12
    path = place / f"org__my__model_MME.{file_format}"
    rows: list[list[str]]
    if file_format == "xlsx":
        rows = [[cell.value for cell in row] for row in openpyxl.load_workbook(path).active]
        assert rows[1][-1] == "=1+1\tyes" and any("cells were cut" in note for note in exported.notes)
    elif file_format == "tsv":
        with path.open(newline="") as file:
            rows = list(csv.reader(file, delimiter="\t"))
        assert rows[1][-1] == "=1+1\x01\tyes"
    else:
        records = json.loads(path.read_text())
        rows = [list(records[0]), *(list(record.values()) for record in records)]
    assert rows[0] == ["index", "question", "category", "answer", "image_path", "prediction"] and rows[1][0] == "1"
    status = json.loads((place / "status.json").read_text())
    assert status["pred_format"] == file_format and "CV-Bench-3D" in status["datasets"]


def test_export_for_lmms_eval(folder: Path, tmp_path: Path) -> None:
    exported = export_lmms_eval(folder_predictions(folder), tmp_path, model="m", now=NOW)
    names = {path.name for path in exported.paths}
    assert {"20261128_093000_samples_mme.jsonl", "20261128_093000_samples_mmmu_dev.jsonl"} <= names
    lines = (tmp_path / "m/20261128_093000_samples_mme.jsonl").read_text().splitlines()
    sample = json.loads(lines[1])
    assert (sample["doc_id"], sample["target"], sample["filtered_resps"]) == (1, "No", ["No"])
    assert len(sample["doc_hash"]) == 64
    assert safe_name("../..") == "__" and safe_name("") == "model"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools/evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_commands_one_after_another(
    tool: ModuleType, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> str:
        assert tool.main(list(map(str, arguments))) == 0
        captured = capsys.readouterr()
        assert captured.err == ""
        return captured.out

    assert f"scores: {folder}/scores.json" in run("score", folder, "--judge", "heuristic", "--rules", "head2026")
    run("report", folder, "--names", "mine", "--out", tmp_path / "report")
    assert "VLMEvalKit head2026" in (tmp_path / "report/report.md").read_text()
    run("export", folder, "--to", "lmms-eval", "--out", tmp_path / "kit", "--model", "m")
    assert (tmp_path / "kit/m").is_dir()
    assert "MME: 2 questions" in run("check", "--data", tmp_path / "tables", "--benchmarks", "MME,pope")
    assert tool.main(["check", "--data", str(tmp_path), "--benchmarks", "MME"]) == 1
    assert "nothing is downloaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("score", "--judge", "gpt"), "give none, heuristic, replay, or an address"),
        (("score", "--judge", "replay"), "judge_replies.jsonl does not exist"),
        (("score", "--judge", "http://x", "--judge_timeout", "0"), "--judge_timeout must be positive"),
        (("report", "--names", "a,b"), "must be 1 different names"),
        (("golden",), "holds no file of golden replies"),
    ],
)
def test_wrong_commands_say_what_is_wrong(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    command, *others = arguments
    assert tool.main([command, str(tmp_path), *others]) == 2
    assert message in capsys.readouterr().err


def test_a_mismatch_exits_with_1(tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = {"id": "x", "answer": "(A)", "prediction": "A", "expected": {"gold": "A", "hit": False}}
    (tmp_path / "cvbench.jsonl").write_text(json.dumps(case))
    assert tool.main(["golden", str(tmp_path)]) == 1
    assert "x/hit: expected False, found True" in capsys.readouterr().out
