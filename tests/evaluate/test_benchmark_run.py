"""tools/evaluate.py run: from pictures to a report, killed and resumed, bad questions, locks, signals."""

import importlib.util
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from forked import exit_code, fork
from harness import free_port
from public_files import NUM_QUESTIONS, TABLES, encoded, png, write_parquet, write_tables, write_tsv
from tiny_checkpoint import export_tiny, write_tiny_checkpoint

from aki_megatron.config.evaluate_section import EvaluateConfig
from aki_megatron.evaluate.benchmark_folder import folder_predictions, load_scores
from aki_megatron.evaluate.benchmarks.registry import BENCHMARKS
from aki_megatron.supervise.run_lock import RunLock
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.train.evaluations import evaluation_command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools/evaluate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "tools"))  # where the interpreter looks that runs the tool
    try:
        spec.loader.exec_module(module)
        import answer_benchmarks  # noqa: F401
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(checkpoint, tmp_path_factory.mktemp("hf") / "aki-tiny")


@pytest.fixture
def run(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """``run(model, out, flag, ...)`` returns the exit code, stdout and stderr."""

    def call(model: Path, out: Path, *flags: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = tool.main(["run", str(model), "--out", str(out), *map(str, flags)])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def counts(out: Path) -> dict[str, int]:
    """Questions with a prediction, by benchmark; each must have one line."""
    lines = [json.loads(line) for path in out.glob("*/predictions*.jsonl") for line in path.read_text().splitlines()]
    keys = Counter((line["question"]["benchmark"], line["question"]["id"]) for line in lines)
    assert set(keys.values()) <= {1}, keys
    return dict(Counter(name for name, _ in keys))


@pytest.mark.parametrize("file_format", ["tsv", "parquet"])
def test_from_pictures_to_a_report(file_format, checkpoint, exported, tool, run, tmp_path, capsys) -> None:
    write, model = {"tsv": (write_tables, checkpoint.parent), "parquet": (write_parquet, exported)}[file_format]
    data, out = write(tmp_path / "data"), tmp_path / "out"
    flags = ("--data", data, "--max_new_tokens", 4, "--score")
    code, printed, errors = run(model, out, *flags)
    assert (code, errors) == (0, "") and counts(out) == NUM_QUESTIONS
    total = sum(NUM_QUESTIONS.values())
    assert f"answered {total} of {total} questions: {total} in " in printed and "answers/s" in printed
    predictions = [each for group in folder_predictions(out).values() for each in group]
    assert all(each.profile == "table6" and not each.error for each in predictions)
    assert any(each.reply for each in predictions)
    scores = load_scores(out)
    assert [score.benchmark for score in scores] == list(BENCHMARKS) and all(score.is_complete for score in scores)
    assert tool.main(["report", str(out), "--names", "tiny"]) == 0
    assert "tiny" in (out / "report.md").read_text() and not (out / "RUNNING").exists()

    code, printed, _ = run(model, out, *flags)
    assert code == 0 and f"0 of {total} questions to answer" in printed and counts(out) == NUM_QUESTIONS
    code, _, errors = run(model, out, *flags, "--profile", "vlmevalkit")
    assert code == 2 and "profile was 'table6', now 'vlmevalkit'" in errors
    code, _, errors = run(model, out, "--data", data, "--max_new_tokens", 5)
    assert code == 2 and "max_new_tokens was 4, now 5" in errors


def test_a_folder_and_its_checkpoint_answer_alike_and_are_told_apart(checkpoint, exported, run, tmp_path) -> None:
    flags = ("--data", write_tables(tmp_path / "data"), "--benchmarks", "MMMU,mmbench", "--max_new_tokens", 6)
    assert (
        run(checkpoint, tmp_path / "a", *flags)[0] == run(exported, tmp_path / "b", *flags, "--batch_size", 1)[0] == 0
    )
    replies = [
        {each.question.id: each.reply for group in folder_predictions(tmp_path / name).values() for each in group}
        for name in "ab"
    ]
    assert replies[0] == replies[1] and len(replies[0]) == 4
    code, _, errors = run(exported, tmp_path / "a", *flags)
    assert code == 2 and "MMMU holds other predictions: model was 'model" in errors and "now 'aki-tiny (" in errors


def many_questions(folder: Path, count: int) -> Path:
    """Write MME's table with so many questions about one picture, and POPE's."""
    folder.mkdir()
    first = TABLES["MME"][0]
    others = [
        {**first, "index": number, "image": "1", "image_path": f"{number // 2}.png"} for number in range(2, count)
    ]
    write_tsv(folder / "MME.tsv", [first, *others])
    write_tsv(folder / "POPE.tsv", TABLES["POPE"])
    return folder


def start_ranks(tool: ModuleType, world_size: int, arguments: list[str]) -> list[int]:
    """Start the command as so many ranks, without an interpreter of their own; return their process ids."""
    import answer_benchmarks

    ranks = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def run_rank(rank: int) -> bool:
        torch.set_num_threads(1)
        environ = ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size)}
        return answer_benchmarks.run_command(arguments, environ, [], lambda folder, names: None) == 0

    return [fork(lambda rank=rank: run_rank(rank)) for rank in range(world_size)]  # type: ignore[misc]


def wait_for_answers(out: Path, count: int) -> None:
    end = time.monotonic() + 300
    while sum(path.read_bytes().count(b"\n") for path in out.glob("*/predictions*.jsonl")) < count:
        assert time.monotonic() < end, "no answers came"
        time.sleep(0.01)


def test_killed_in_the_middle_and_resumed_by_another_number_of_processes(checkpoint, tool, run, tmp_path) -> None:
    data, out = many_questions(tmp_path / "data", 60), tmp_path / "out"
    flags = ["--data", str(data), "--benchmarks", "MME,POPE", "--max_new_tokens", "40", "--batch_size", "2"]
    arguments = [str(checkpoint), "--out", str(out), *flags]
    children = start_ranks(tool, 2, arguments)
    wait_for_answers(out, 8)
    for child in children:
        os.kill(child, signal.SIGKILL)
    assert [exit_code(child) for child in children] == [-signal.SIGKILL] * 2
    files = sorted(out.glob("MME/predictions_*.jsonl"))
    with files[0].open("a") as file:  # as a kill in the middle of a line leaves it
        file.write('{"question": {"benchmark": "MME", "id": "59", "text": "a }')
    before = sum(counts_of_complete_lines(out).values())
    assert 8 <= before < 60 and (out / "RUNNING").exists()

    children = start_ranks(tool, 3, arguments)
    assert [exit_code(child) for child in children] == [0, 0, 0]
    complete = counts_of_complete_lines(out)
    assert complete == {"MME": 59, "POPE": 1} and not (out / "RUNNING").exists()
    code, printed, _ = run(checkpoint, out, *flags)
    assert code == 0 and "0 of 60 questions to answer" in printed
    assert [len(group) for group in folder_predictions(out).values()] == [59, 1]


def counts_of_complete_lines(out: Path) -> dict[str, int]:
    """As ``counts``, but for lines that a kill has cut short."""
    keys: Counter[tuple[str, str]] = Counter()
    for path in out.glob("*/predictions*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                question = json.loads(line)["question"]
            except json.JSONDecodeError:
                continue
            keys[question["benchmark"], question["id"]] += 1
    assert set(keys.values()) <= {1}, keys
    return dict(Counter(name for name, _ in keys))


def test_sigterm_ends_a_start_that_the_next_one_continues(checkpoint, tool, run, tmp_path) -> None:
    data, out = many_questions(tmp_path / "data", 30), tmp_path / "out"
    flags = ["--data", str(data), "--benchmarks", "MME", "--max_new_tokens", "40", "--batch_size", "1"]
    import answer_benchmarks

    arguments = [str(checkpoint), "--out", str(out), *flags]
    child = fork(lambda: answer_benchmarks.run_command(arguments, {}, [], print) == 128 + signal.SIGTERM)
    wait_for_answers(out, 2)
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == 0 and not (out / "RUNNING").exists()
    assert 2 <= sum(counts(out).values()) < 29
    code, printed, _ = run(checkpoint, out, *flags)
    assert code == 0 and counts(out) == {"MME": 29}


def test_images_that_cannot_be_read_are_counted_and_asked_again_when_mended(checkpoint, run, tmp_path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    rows = [{**TABLES["RealWorldQA"][0], "index": number} for number in range(4)]
    for row, name in zip(rows, ("good.png", "missing.png", "text.png", "huge.png"), strict=True):
        del row["image"]
        row["image_path"] = name
    rows[3]["question"] = "word " * 600

    write_tsv(data / "RealWorldQA_local.tsv", rows)
    for name in ("good.png", "huge.png"):
        (data / name).write_bytes(png())
    (data / "text.png").write_text("no picture")
    flags = ("--data", data, "--benchmarks", "RealWorldQA", "--max_new_tokens", 3)
    code, printed, _ = run(checkpoint, out, *flags, "--score")
    assert code == 0 and "3 of them could not be asked" in printed
    errors = {each.question.id: each.error for each in folder_predictions(out)["RealWorldQA"]}
    assert not errors["0"] and "its image is missing" in errors["1"] and "not a readable image" in errors["2"]
    assert "more than the 512 of the model" in errors["3"] and "could not be asked: " in printed
    (score,) = load_scores(out)
    assert score.num_errors == 3 and score.is_complete

    for name in ("missing.png", "text.png"):
        (data / name).write_bytes(png("blue"))
    code, printed, _ = run(checkpoint, out, *flags)
    assert "0 of 4 questions to answer" in printed
    code, printed, _ = run(checkpoint, out, *flags, "--retry_errors")
    assert code == 0 and "3 of 4 questions to answer" in printed and counts(out) == {"RealWorldQA": 4}
    assert [bool(each.error) for each in folder_predictions(out)["RealWorldQA"]].count(True) == 1


def test_what_is_missing_damaged_or_unknown(checkpoint, run, tmp_path) -> None:
    data = write_tables(tmp_path / "data")
    twice = [TABLES["POPE"][0], TABLES["POPE"][0]]
    write_tsv(data / "POPE.tsv", twice)
    write_tsv(
        data / "SEEDBench_IMG.tsv", [{**TABLES["SEEDBench_IMG"][0], "category": "no such category", "image": encoded()}]
    )
    (data / "MME.tsv").unlink()
    flags = ("--data", data, "--max_new_tokens", 2, "--per_benchmark", 1)
    code, printed, _ = run(checkpoint, tmp_path / "out", *flags, "--score")
    assert code == 1 and "not answered: POPE: " in printed and "is there twice" in printed
    assert "without files, left out: MME (evaluate.py check)" in printed
    expected = {name: 2 if name == "MMBench" else 1 for name in NUM_QUESTIONS if name not in ("MME", "POPE")}
    assert counts(tmp_path / "out") == expected, "the rotations of a question stay together"
    for flags, message in (
        (("--benchmarks", "POPE"), "is there twice"),
        (("--benchmarks", "VQA"), "known are MME"),
        (("--tensor_parallel", 2), "does not divide the 1 processes"),
    ):
        code, _, errors = run(checkpoint, tmp_path / "other", "--data", data, *flags)
        assert code == 2 and message in errors
    (tmp_path / "empty").mkdir()
    code, _, errors = run(checkpoint, tmp_path / "other", "--data", tmp_path / "empty")
    assert code == 2 and f"No benchmark can be read in {tmp_path / 'empty'}" in errors
    code, _, errors = run(tmp_path / "nothing", tmp_path / "other", "--data", data)
    assert code == 2 and "nothing does not exist" in errors
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    code, _, errors = run(checkpoint, tmp_path / "run", "--data", data)
    assert code == 2 and "is the folder of a training run" in errors


def test_two_starts_in_one_folder_are_not_mixed(checkpoint, run, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lock = RunLock(RunPaths(out), "1.0", "other", on_waiting=print)
    lock.acquire()
    try:
        code, _, errors = run(checkpoint, out, "--data", write_tables(tmp_path / "data"))
        assert code == 2 and f"{out} is in use: another start writes answers there (process {os.getpid()}" in errors
        assert not list(out.glob("*/*"))
    finally:
        lock.release()


def test_a_training_run_gives_the_arguments_of_the_tool(tool) -> None:
    import answer_benchmarks

    config = EvaluateConfig(interval=1, benchmarks=("MME",), data=(Path("/a"), Path("/b")), flags=("--dtype", "fp32"))
    words = evaluation_command(config, Path("/run/step_000001"), Path("/out"))
    assert words[:3] == ["sbatch", "slurm/evaluate.sbatch", "run"]
    parsed = answer_benchmarks.argument_parser().parse_args(words[3:])
    assert (parsed.model, parsed.out, parsed.score) == (Path("/run/step_000001"), Path("/out"), True)
    assert (parsed.benchmarks, parsed.data, parsed.dtype) == ("MME", [Path("/a"), Path("/b")], "fp32")
