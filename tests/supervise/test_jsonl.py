"""Files of JSON lines after a crash in the middle of a write, and with damaged lines."""

from pathlib import Path

import pytest

from aki_megatron.errors import DataError
from aki_megatron.supervise.attempts import read_attempts, record_end, record_start
from aki_megatron.supervise.events import read_events, record_event
from aki_megatron.supervise.jsonl import append_line, damaged_file, discard_steps_after
from aki_megatron.supervise.metrics import read_metrics
from aki_megatron.supervise.run_paths import RunPaths


def test_only_a_line_truncated_by_a_crash_is_lost(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    record_event(paths, 3, "loss_spike", "the loss is high")
    with paths.events.open("a") as file:
        file.write('{"time": 1, "st')
    assert len(read_events(paths)) == 1
    record_event(paths, 9, "rollback", "back")
    assert [(event["step"], event["kind"]) for event in read_events(paths)] == [(3, "loss_spike"), (9, "rollback")]
    append_line(paths.attempts, {"a": 1})
    assert paths.attempts.read_text() == '{"a": 1}\n'


BAD = [
    b'{"step": 2, "lo\n',
    b"\x00\x00\xff\n",
    b"[2]\n",
    b'{"loss": 1}\n',
    b'{"step": "2"}\n',
    b'{"step": true}\n',
    b"7\n",
]


@pytest.mark.parametrize("bad", BAD)
def test_a_damaged_line_of_metrics_is_named(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 3}\n')
    with pytest.raises(DataError, match=rf"^{path}: line 2 is damaged: .*; correct or delete the line\.$"):
        read_metrics(path)


@pytest.mark.parametrize("bad", BAD)
def test_a_run_goes_on_without_a_damaged_line_and_keeps_it(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'{"step": 3}\n{"step": 4}\n{"step')
    discard_steps_after(path, 3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    assert damaged_file(path).read_bytes() == bad
    discard_steps_after(path, 1)
    assert path.read_bytes() == b'{"step": 1}\n' and damaged_file(path).read_bytes() == bad


def test_damaged_lines_of_a_history_are_left_out(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    record_event(paths, 3, "stop", "a")
    record_start(paths, "7.0", from_step=0)
    for path in (paths.events, paths.attempts):
        with path.open("ab") as file:
            file.writelines([*BAD, b'{"attempt": "7.1", "time": "yesterday"}\n', b'{"attempt": 7, "time": 1}\n'])
    record_event(paths, 4, "stop", "b")
    record_end(paths, "7.0", step=4, end="interrupted", reason="")
    assert [event["text"] for event in read_events(paths)] == ["a", "b"]
    (attempt,) = read_attempts(paths)
    assert attempt.end == "interrupted" and attempt.step == 4


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(DataError, match=r"metrics\.jsonl cannot be read: Is a directory\."):
        read_metrics(tmp_path / "metrics.jsonl")
