"""A full disk costs no line: lines wait in memory, or in the checkpoint of a run that has to stop."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from aki_megatron.errors import DataError
from aki_megatron.supervise.jsonl import append_line, read_lines
from aki_megatron.supervise.step_log import UNWRITTEN, StepLog, StepLogs, restore_unwritten

DISK_BYTES = 2**16


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={DISK_BYTES}"]
    mounted = subprocess.run(["mount", *options, "none", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("a full disk needs a small file system, and this user may not mount one")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Leave no block free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(100)):
            pass
    return filler


def line(step: int) -> dict[str, object]:
    return {"step": step, "text": "x" * 200}


def steps_in(path: Path) -> list[int]:
    return [each["step"] for each in read_lines(path)]


def test_lines_wait_for_room_and_are_written_in_order(small_disk: Path) -> None:
    failures: list[str] = []
    log = StepLog(small_disk / "metrics.jsonl", report_failure=failures.append)
    log.start(0)
    log.write(line(1))
    filler = fill(small_disk)
    for step in range(2, 60):  # what is left of the file's own block holds some of them
        log.write(line(step))
    on_disk = steps_in(log.path)
    assert on_disk == list(range(1, len(on_disk) + 1)) and len(on_disk) < 59
    assert log.path.read_bytes().endswith(b"\n"), "no part of a line is left"
    assert len(failures) == 1 and "No space left on device" in failures[0] and str(log.path) in failures[0]
    filler.unlink()
    log.write(line(60))
    log.close()
    assert steps_in(log.path) == list(range(1, 61))


def test_a_rollback_on_a_full_disk_drops_the_lines_of_later_steps(small_disk: Path) -> None:
    log = StepLog(small_disk / "metrics.jsonl")
    log.start(0)
    log.write(line(1))
    filler = fill(small_disk)
    for step in range(2, 60):
        log.write(line(step))
    log.start(40)
    for step in range(41, 50):
        log.write(line(step))
    filler.unlink()
    log.close()
    assert steps_in(log.path) == list(range(1, 50))
    log.start(3)
    log.close()
    assert steps_in(log.path) == [1, 2, 3]


class FullDisk:
    """Writes of step logs fail while ``full``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        self._write = os.write
        monkeypatch.setattr("aki_megatron.supervise.step_log.os.write", self.write)

    def write(self, file: int, content: bytes) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(file, content)


def test_a_disk_that_stays_full_stops_the_run_and_the_checkpoint_keeps_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, stops = FullDisk(monkeypatch), []
    run, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    logs = StepLogs(run, report_failure=lambda text: None, request_stop=stops.append)
    metrics, audit = logs.open(run / "metrics.jsonl"), logs.open(run / "sample_audit/replica_0.jsonl")
    for log in (metrics, audit):
        log._max_held_lines = 5
        log.start(0)
        log.write(line(1))
    disk.full = True
    for step in range(2, 7):
        assert not stops
        metrics.write(line(step))
        audit.write(line(step))
    assert len(stops) == 2 and "metrics.jsonl could not be written for 5 steps: No space left on device" in stops[0]
    files = logs.unwritten_files()
    assert sorted(files) == [f"{UNWRITTEN}/metrics.jsonl", f"{UNWRITTEN}/sample_audit/replica_0.jsonl"]
    with pytest.raises(DataError, match="5 lines could not be written: No space left on device"):
        metrics.close()
    audit.close(in_checkpoint=True)
    for name, text in files.items():
        (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoint / name).write_text(text)
    with audit.path.open("a") as file:
        file.write('{"step": 2, "te')  # killed in the middle of a line
    for _ in range(2):  # a second start finds them written
        restore_unwritten(checkpoint, run)
        assert steps_in(metrics.path) == steps_in(audit.path) == [1, 2, 3, 4, 5, 6]
    assert [json.loads(text)["step"] for text in files[f"{UNWRITTEN}/metrics.jsonl"].splitlines()] == [2, 3, 4, 5, 6]


def test_a_short_line_is_appended_whole_or_not_at_all(small_disk: Path) -> None:
    path = small_disk / "events.jsonl"
    append_line(path, line(1))
    fill(small_disk)
    with pytest.raises(OSError, match="No space left on device"):
        for step in range(2, 60):
            append_line(path, line(step))
    assert path.read_bytes().endswith(b"\n") and steps_in(path)[0] == 1
