"""One start at a time per run folder, whether the holder is alive, dead, on this machine or on another."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from aki_megatron.errors import ConfigError
from aki_megatron.supervise import run_lock
from aki_megatron.supervise.run_lock import LockHolder, RunLock, check_not_held_by_another, read_holder
from aki_megatron.supervise.run_paths import RunPaths


@pytest.fixture
def waited() -> list[str]:
    return []


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return RunPaths(tmp_path)


def lock_of(paths: RunPaths, waited: list[str], name: str = "a") -> RunLock:
    return RunLock(paths, name, name, on_waiting=waited.append)


def held_by(paths: RunPaths, holder: LockHolder, *, age: float = 0.0) -> None:
    paths.running.write_text(json.dumps(asdict(holder)))
    os.utime(paths.running, (time.time() - age, time.time() - age))


def other(**changes: object) -> LockHolder:
    """A live process of this machine that is not this one."""
    parent = os.getppid()
    ticks = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    holder = LockHolder.of_this_process("b", "b")
    return replace(holder, **{"pid": parent, "start_ticks": ticks} | changes)  # type: ignore[arg-type]


def test_a_second_start_is_refused_and_names_the_first(paths: RunPaths, waited: list[str]) -> None:
    first = lock_of(paths, waited)
    first.acquire()
    holder = read_holder(paths)
    assert holder is not None and holder.pid == os.getpid() and holder == first.holder
    with pytest.raises(ConfigError) as caught:
        lock_of(paths, waited, "b").acquire()
    text = str(caught.value)
    assert f"process {os.getpid()} on {holder.host}, since 20" in text and "attempt a" in text
    assert f"delete {paths.running}" in text and "--run.dir" in text
    assert read_holder(paths) == holder and waited == []
    first.release()
    assert list(paths.path.iterdir()) == []
    second = lock_of(paths, waited, "b")
    second.acquire()
    first.release()  # again: the folder is another's now
    assert read_holder(paths) == second.holder
    second.release()


def test_a_dead_holder_of_this_machine_is_replaced_at_once(paths: RunPaths, waited: list[str]) -> None:
    code = "from aki_megatron.supervise.run_lock import *; from pathlib import Path;"
    code += (
        f"RunLock(RunPaths(Path({str(paths.path)!r})), 'b', 'b', on_waiting=print).acquire(); import os; os._exit(0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout == b""
    assert paths.running.exists()
    lock = lock_of(paths, waited)
    lock.acquire()
    assert read_holder(paths) == lock.holder and waited == []
    lock.release()
    held_by(paths, other(start_ticks=1))  # another process has its pid now
    lock = lock_of(paths, waited)
    lock.acquire()
    lock.release()


def test_a_holder_of_another_machine_lives_while_it_beats(
    paths: RunPaths, waited: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(run_lock, "POLL_SECONDS", 0.05)
    far = other(host="gpu07", machine="another boot")
    held_by(paths, far, age=1.0)
    threading.Timer(0.3, lambda: os.utime(paths.running)).start()
    with pytest.raises(ConfigError, match="on gpu07"):
        lock_of(paths, waited).acquire()
    assert len(waited) == 1 and "waiting 1 s at most" in waited[0]
    started = time.monotonic()
    lock = lock_of(paths, waited)
    lock.acquire()  # no beat any more
    assert 1.0 < time.monotonic() - started < 10.0
    lock.release()
    held_by(paths, far, age=60.0)
    lock = lock_of(paths, waited)
    lock.acquire()
    lock.release()
    assert len(waited) == 2, "a file that is old enough is taken over without waiting"
    assert list(paths.path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"pid": "x"}'])
def test_a_damaged_file_is_replaced(
    paths: RunPaths, waited: list[str], content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "UNREADABLE_SECONDS", 0.1)
    paths.running.write_bytes(content)
    lock = lock_of(paths, waited)
    lock.acquire()
    assert read_holder(paths) == lock.holder
    lock.release()


def test_only_one_of_many_starts_replaces_a_dead_holder(paths: RunPaths, tmp_path: Path) -> None:
    code = "import sys, time; from aki_megatron.supervise.run_lock import *; from pathlib import Path\n"
    code += "lock = RunLock(RunPaths(Path(sys.argv[1])), 'c', 'c', on_waiting=print)\n"
    code += "try:\n    lock.acquire(); print('held', flush=True); sys.stdin.read()\n"
    code += "except ConfigError as error:\n    print('refused', flush=True)\n"
    for _ in range(3):
        held_by(paths, other(start_ticks=1))
        command = [sys.executable, "-c", code, str(paths.path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        starts = [subprocess.Popen(command, **pipes) for _ in range(6)]
        deadline = time.monotonic() + 60
        while sum(start.poll() is None for start in starts) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)  # the holder keeps the folder until its stdin is closed
        said = sorted(start.communicate(timeout=60)[0] for start in starts)
        assert said == ["held\n"] + ["refused\n"] * 5


def test_a_holder_notices_that_it_lost_the_folder(
    paths: RunPaths, waited: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_lock, "BEAT_SECONDS", 0.05)
    told = list[str]()
    lock = lock_of(paths, waited)
    lock.acquire()
    lock.watch(told.append)
    before = paths.running.stat().st_mtime_ns
    paths.running.unlink()  # by a user who took the holder for dead, and has started nothing
    time.sleep(0.5)
    assert read_holder(paths) == lock.holder and told == []
    time.sleep(0.2)
    assert paths.running.stat().st_mtime_ns > before
    held_by(paths, other())
    time.sleep(0.5)
    (text,) = told
    assert f"another start has taken over the run folder {paths.path}: process {os.getppid()}" in text
    lock.release()
    assert read_holder(paths) is not None, "the other's"


@pytest.mark.parametrize("replaced", [False, True])
def test_a_holder_notices_that_the_folder_was_removed(tmp_path: Path, waited: list[str], replaced: bool) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.path.mkdir()
    lock = lock_of(paths, waited)
    lock.acquire()
    assert lock.lost() == ""
    paths.path.rename(tmp_path / "moved")
    if replaced:
        paths.path.mkdir()
    how = "replaced" if replaced else "removed"
    assert lock.lost() == f"the run folder {paths.path} was {how} while the run trained in it"
    lock.release()


def test_other_ranks_refuse_a_folder_of_another_start(paths: RunPaths, waited: list[str]) -> None:
    check_not_held_by_another(paths, "a")
    held_by(paths, other())
    check_not_held_by_another(paths, "b")
    with pytest.raises(ConfigError, match="is in use"):
        check_not_held_by_another(paths, "a")
    held_by(paths, other(start_ticks=1))
    check_not_held_by_another(paths, "a")
