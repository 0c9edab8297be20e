"""Attempts are counted, also those that die at once; the verdict tells a batch script what to do."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aki_megatron.supervise.attempts import begin_attempt, end_attempt, newest_step, read_attempts, without_progress
from aki_megatron.supervise.events import read_events, record
from aki_megatron.supervise.run_paths import RunPaths, append_line
from tools.attempt import main


def save(folder: RunPaths, step: int) -> None:
    """What tells a complete checkpoint."""
    path = folder.checkpoints / f"step_{step:06d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


def begin(folder: RunPaths, attempt: str) -> int:
    return main(["begin", str(folder.path), "--attempt", attempt])


def verdict(folder: RunPaths, attempt: str, give_up_after: int = 3) -> int:
    return main(["verdict", str(folder.path), "--attempt", attempt, "--give-up-after", str(give_up_after)])


def test_attempts_of_one_name_are_one(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path)
    begin_attempt(folder, "7.0", from_step=4)
    begin_attempt(folder, "7.0", from_step=4, world_size=2, hosts=["a", "b"])
    end_attempt(folder, "7.0", step=9, end="stopped", reason="the time limit")
    begin_attempt(folder, "7.1", from_step=8)
    first, second = read_attempts(folder)
    assert (first.name, first.from_step, first.world_size, first.hosts) == ("7.0", 4, 2, ("a", "b"))
    assert (first.step, first.end, first.reason) == (9, "stopped", "the time limit")
    assert first.ended is not None and first.began <= first.ended <= second.began
    assert (second.name, second.from_step, second.end) == ("7.1", 8, None)


def test_a_line_that_a_crash_has_cut_is_lost_and_no_other(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path)
    record(folder, 3, "spike", "the loss is high")
    with folder.events.open("a") as file:
        file.write('{"time": 1, "st')
    assert len(read_events(folder)) == 1
    record(folder, 9, "rollback", "back")
    assert [(event["step"], event["kind"]) for event in read_events(folder)] == [(3, "spike"), (9, "rollback")]
    append_line(folder.attempts, {"a": 1})
    assert folder.attempts.read_text() == '{"a": 1}\n'


def test_only_a_newer_checkpoint_is_progress(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path)
    ends = [(0, "failed"), (0, None), (5, None), (5, "failed"), (5, None)]
    for number, (from_step, end) in enumerate(ends):
        begin_attempt(folder, str(number), from_step=from_step)
        if end is not None:
            end_attempt(folder, str(number), step=None, end=end, reason="")  # type: ignore[arg-type]
    attempts = read_attempts(folder)
    assert without_progress(attempts, 5) == 3
    assert without_progress(attempts, 6) == 0
    assert without_progress(attempts[:2], 0) == 2
    assert without_progress(attempts[:2], 5) == 0
    end_attempt(folder, "3", step=5, end="stopped", reason="")
    assert without_progress(read_attempts(folder), 5) == 1, "a run that stops in order is not stuck"


def test_a_crash_loop_is_given_up_with_the_last_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunPaths(tmp_path / "new/run")
    codes = []
    for number in range(3):
        assert begin(folder, f"1.{number}") == 0
        folder.logs.mkdir(exist_ok=True)
        folder.first_failure.write_text(json.dumps({"rank": 4, "text": "OSError: no\n  disk", "time": time.time()}))
        codes.append(verdict(folder, f"1.{number}"))
    assert codes == [10, 10, 20]
    said = capsys.readouterr().out.splitlines()
    assert said[1].startswith("retry: ") and "1 of 3 in a row" in said[1]
    assert said[-1] == (
        "give up: 3 attempts in a row left no newer checkpoint than that of step 0; last error, on rank 4: OSError: no "
        "disk"
    )
    assert verdict(folder, "1.2") == 20, "asked again it says the same"
    assert capsys.readouterr().out.splitlines() == [said[-1]]
    assert begin(folder, "2.0") == 0 and verdict(folder, "2.0") == 10, "what a person starts counts anew"


def test_a_newer_checkpoint_makes_another_attempt_worth_it(tmp_path: Path) -> None:
    folder = RunPaths(tmp_path)
    for number in range(6):
        begin(folder, f"1.{number}")
        if number % 2:
            save(folder, 10 * number)
        assert verdict(folder, f"1.{number}", give_up_after=2) == 10
    assert newest_step(folder) == 50


def test_an_attempt_that_nobody_announced_counts_too(tmp_path: Path) -> None:
    assert verdict(RunPaths(tmp_path), "1.0", give_up_after=1) == 20
    assert verdict(RunPaths(tmp_path / "other"), "1.0", give_up_after=2) == 10


def test_an_error_of_an_earlier_attempt_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunPaths(tmp_path)
    folder.logs.mkdir()
    folder.first_failure.write_text(json.dumps({"rank": 0, "text": "old", "time": time.time() - 60}))
    begin(folder, "1.0")
    verdict(folder, "1.0")
    assert "no rank left a message" in capsys.readouterr().out


def test_files_decide_before_anything_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = RunPaths(tmp_path)
    begin(folder, "1.0")
    folder.stopped("1.0").write_text('{"step": 7, "reason": "SIGUSR1"}')
    assert verdict(folder, "1.0", give_up_after=1) == 10
    folder.stop.touch()
    assert verdict(folder, "1.0", give_up_after=1) == 30
    assert begin(folder, "1.1") == 30
    folder.done.touch()
    assert verdict(folder, "1.0", give_up_after=1) == 0
    said = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["begin", "stopped", "stop-file", "stop-file", "done"]
    assert [attempt.name for attempt in read_attempts(folder)] == ["1.0"], "a forbidden start is no attempt"


def test_the_command_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    command = "import sys; from tools.attempt import main; from tools import status; sys.exit('torch' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", command], cwd=root, timeout=60).returncode == 0


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_wrong_number_of_attempts_is_refused(tmp_path: Path, number: str) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["verdict", str(tmp_path), "--attempt", "1.0", "--give-up-after", number])
    assert refused.value.code == 2
