"""A process whose loader fails ends within seconds, with a message and no worker left, whatever the fault."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import exit_code, fork

from aki_megatron.data.loader import init_worker

SCRIPT = Path(__file__).with_name("failing_loader.py")
MAX_SECONDS = 90
"""Imports included, on a busy machine; a hang lasts for ever."""

SMALL_SHARED_MEMORY = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=200k none /dev/shm && exec "$@"', "sh"]


def load(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the script in a process of its own."""
    command = [*before, sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=MAX_SECONDS, check=False)


@pytest.mark.parametrize("num_workers", ["1", "4"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("user error", "error: row 100 is broken\n"),
        ("killed", "A worker process that decodes images ended without an error message"),
    ],
)
def test_a_failed_worker_ends_the_process(fault: str, message: str, num_workers: str) -> None:
    result = load(fault, num_workers)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and result.stderr.count("error:") == 1, result.stderr


def test_a_bug_in_a_worker_is_not_called_a_killed_worker() -> None:
    result = load("bug", "2")
    assert result.returncode == 1
    assert result.stderr.endswith("\nRuntimeError: a bug at row 100\n") and "Original Traceback" in result.stderr
    assert "ended without an error message" not in result.stderr


def test_a_process_that_just_ends_takes_its_workers_with_it() -> None:
    assert load("exit", "4").returncode == 0


@pytest.mark.parametrize("num_workers", ["1", "4"])
def test_full_shared_memory_is_an_error_with_advice(num_workers: str) -> None:
    if subprocess.run([*SMALL_SHARED_MEMORY, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small /dev/shm")
    result = load("none", num_workers, before=tuple(SMALL_SHARED_MEMORY))
    assert result.returncode == 2, result.stderr
    assert "enlarge /dev/shm" in result.stderr and result.stderr.count("error:") == 1, result.stderr


def test_workers_outlive_a_sigterm_to_the_job_but_not_their_rank(tmp_path: Path) -> None:
    """A scheduler's SIGTERM must not take the batches away from a rank that saves its state."""
    pids_file = tmp_path / "pids"
    process = subprocess.Popen([sys.executable, str(SCRIPT), "slow", "2", str(pids_file)])
    try:
        deadline = time.monotonic() + MAX_SECONDS
        while not (pids_file.exists() and len(pids_file.read_text().split()) == 2) and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = [int(pid) for pid in pids_file.read_text().split()]
        for _ in range(3):
            for pid in workers:
                os.kill(pid, signal.SIGTERM)
            time.sleep(0.3)
        assert process.poll() is None and all(_is_running(pid) for pid in workers)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while any(_is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_is_running(pid) for pid in workers)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_worker_prints_its_errors_but_not_the_end_of_its_rank(capfd: pytest.CaptureFixture[str]) -> None:
    def work() -> bool:
        init_worker(0)
        for error in (ConnectionResetError("of the rank"), EOFError("of the rank"), ValueError("of its own")):
            sys.excepthook(type(error), error, None)  # as multiprocessing's threads do
        return True

    assert exit_code(fork(work)) == 0
    errors = capfd.readouterr().err
    assert "of its own" in errors and "of the rank" not in errors
