"""Attempts: all are counted, also those that fail at once; the decision tells a batch script what to do."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from aki_megatron.supervise.attempts import count_without_progress, newest_step, read_attempts, record_end, record_start
from aki_megatron.supervise.first_failure import FirstFailure
from aki_megatron.supervise.run_paths import RunPaths
from tools.attempt import main


def save_checkpoint(paths: RunPaths, step: int) -> None:
    """Create what marks a complete checkpoint."""
    path = paths.checkpoints / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


def begin(paths: RunPaths, attempt: str) -> int:
    return main(["begin", str(paths.path), "--attempt", attempt])


def decide(paths: RunPaths, attempt: str, give_up_after: int = 3) -> int:
    return main(["decide", str(paths.path), "--attempt", attempt, "--give-up-after", str(give_up_after)])


def test_lines_of_one_name_are_one_attempt(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    record_start(paths, "7.0", from_step=4)
    record_start(paths, "7.0", from_step=4, world_size=2, hosts=["a", "b"])
    record_end(paths, "7.0", step=9, end="stopped", reason="the time limit")
    record_start(paths, "7.1", from_step=8)
    first, second = read_attempts(paths)
    assert (first.name, first.from_step, first.world_size, first.hosts) == ("7.0", 4, 2, ("a", "b"))
    assert (first.step, first.end, first.reason) == (9, "stopped", "the time limit")
    assert first.ended is not None and first.began <= first.ended <= second.began
    assert (second.name, second.from_step, second.end) == ("7.1", 8, None)


def test_only_a_newer_checkpoint_is_progress(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    ends = [(0, "failed"), (0, None), (5, None), (5, "failed"), (5, None)]
    for number, (from_step, end) in enumerate(ends):
        record_start(paths, str(number), from_step=from_step)
        if end is not None:
            record_end(paths, str(number), step=None, end=end, reason="")  # type: ignore[arg-type]
    attempts = read_attempts(paths)
    assert count_without_progress(attempts, 5) == 3
    assert count_without_progress(attempts, 6) == 0
    assert count_without_progress(attempts[:2], 0) == 2
    assert count_without_progress(attempts[:2], 5) == 0
    record_end(paths, "3", step=5, end="stopped", reason="")
    assert count_without_progress(read_attempts(paths), 5) == 1, "a run that stops in an orderly way is not stuck"


def test_a_crash_loop_is_given_up_with_the_last_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = RunPaths(tmp_path / "new/run")
    codes = []
    for number in range(3):
        assert begin(paths, f"1.{number}") == 0
        files = paths.start("a")
        files.path.mkdir(parents=True, exist_ok=True)
        files.first_failure.unlink(missing_ok=True)
        FirstFailure(4, "OSError: no\n  disk", 1, 4).write_once(files.first_failure)
        codes.append(decide(paths, f"1.{number}"))
    assert codes == [10, 10, 20]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith("retry: ") and "1 of 3 in a row" in printed[1]
    assert printed[-1] == (
        "give up: 3 attempts in a row left no newer checkpoint than that of step 0; last error, on rank 4: OSError: no "
        "disk"
    )
    assert decide(paths, "1.2") == 20, "asked again it decides the same"
    assert capsys.readouterr().out.splitlines() == [printed[-1]]
    assert begin(paths, "2.0") == 0 and decide(paths, "2.0") == 10, "attempts started by hand are counted from one"


def test_a_newer_checkpoint_makes_another_attempt_worthwhile(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for number in range(6):
        begin(paths, f"1.{number}")
        if number % 2:
            save_checkpoint(paths, 10 * number)
        assert decide(paths, f"1.{number}", give_up_after=2) == 10
    assert newest_step(paths) == 50


def test_an_attempt_without_a_start_line_counts_too(tmp_path: Path) -> None:
    assert decide(RunPaths(tmp_path), "1.0", give_up_after=1) == 20
    assert decide(RunPaths(tmp_path / "other"), "1.0", give_up_after=2) == 10


def test_an_error_of_an_earlier_attempt_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = RunPaths(tmp_path)
    paths.start("a").path.mkdir(parents=True)
    FirstFailure(0, "old", 1, 0, time.time() - 60).write_once(paths.start("a").first_failure)
    begin(paths, "1.0")
    decide(paths, "1.0")
    assert "no rank left an error message" in capsys.readouterr().out


def test_files_decide_before_attempts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = RunPaths(tmp_path)
    begin(paths, "1.0")
    paths.stopped("1.0").write_text('{"step": 7, "reason": "SIGUSR1"}')
    assert decide(paths, "1.0", give_up_after=1) == 10
    paths.stop.touch()
    assert decide(paths, "1.0", give_up_after=1) == 30
    assert begin(paths, "1.1") == 30
    paths.done.touch()
    assert decide(paths, "1.0", give_up_after=1) == 0
    printed = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert printed == ["begin", "stopped", "stop-file", "stop-file", "done"]
    assert [attempt.name for attempt in read_attempts(paths)] == ["1.0"], "a forbidden start is not an attempt"


def test_the_commands_of_batch_scripts_import_no_torch(tmp_path: Path) -> None:
    command = "import sys; from tools import attempt, preflight, status; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", command], cwd=root, timeout=60).returncode == 0


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_wrong_number_of_attempts_is_refused(tmp_path: Path, number: str) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["decide", str(tmp_path), "--attempt", "1.0", "--give-up-after", number])
    assert refused.value.code == 2


def test_a_run_folder_that_cannot_be_used_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    for path in (file, tmp_path / "link", tmp_path / ("x" * 300), Path("/proc/run")):
        assert begin(RunPaths(path), "1.0") == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ") and str(path) in message and message.count("\n") == 1, message


def test_damaged_files_do_not_stop_a_batch_script(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    begin(paths, "1.0")
    files = paths.start("a")
    files.path.mkdir(parents=True)
    for path in (paths.attempts, files.first_failure):
        with path.open("ab") as file:
            file.write(b"\xff\n[]\n{}\n")
    paths.checkpoints.mkdir()
    (paths.checkpoints / "latest").write_bytes(b"\xff")
    assert decide(paths, "1.0") == 10
    paths.stopped("1.0").write_bytes(b"\xff")
    assert decide(paths, "1.0") == 10


def test_an_attempt_that_ctrl_c_ended_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = RunPaths(tmp_path)
    for number in range(4):
        begin(paths, f"1.{number}")
        record_end(paths, f"1.{number}", step=3, end="interrupted", reason="interrupted by Ctrl-C (SIGINT)")
        assert decide(paths, f"1.{number}") == 10
        assert "stopped: interrupted by Ctrl-C" in capsys.readouterr().out
