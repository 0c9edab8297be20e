"""Failing ranks without a launcher: whatever ends one of them, all end, and one error names the first."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import exit_code, fork

from aki_megatron.errors import ConfigError, DataError
from aki_megatron.supervise import failure
from aki_megatron.supervise.failure import FailureReporter
from aki_megatron.supervise.process import this_process
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import DUPLICATE_SECONDS, StopSignals

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:15558."
TIMEOUT_SECONDS = 20

Behave = Callable[[int, FailureReporter], None]


def wait_for_ever() -> None:
    """Block like a collective whose other rank is dead: nothing ends it."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def run_ranks(
    folder: Path, count: int, behave: Behave, *, sigterm_from_scheduler: bool = False
) -> tuple[list[int], list[str]]:
    """Run ``behave`` in ``count`` processes; return their exit codes and the lines they wrote to stderr."""
    fork = multiprocessing.get_context("fork")
    barrier, printed = fork.Barrier(count), folder / "stderr"

    def rank_main(rank: int) -> None:
        sys.stderr = printed.open("a")
        stop_signals = StopSignals()
        stop_signals.listen()
        reporter = FailureReporter(
            RunPaths(folder),
            rank,
            count,
            stop_signals,
            start_id="a",
            sigterm_from_scheduler=sigterm_from_scheduler,
            on_failure=lambda text, code: (folder / f"note_{rank}").write_text(text),
        )
        reporter.begin()
        barrier.wait()
        reporter.mark_joined()
        barrier.wait()
        try:
            behave(rank, reporter)
            barrier.wait()
        except BaseException as error:
            reporter.exit_now(reporter.report(error))
        reporter.end()
        os._exit(0)

    processes = [fork.Process(target=rank_main, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + TIMEOUT_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert late == [], f"ranks {late} did not end"
    codes = [process.exitcode for process in processes]
    assert None not in codes
    return [code or 0 for code in codes], printed.read_text().splitlines() if printed.exists() else []


def raising(error: BaseException) -> Behave:
    def behave(rank: int, reporter: FailureReporter) -> None:
        reporter.training_started = True
        if rank == 1:
            raise error
        wait_for_ever()

    return behave


def test_a_run_that_ends_well_leaves_only_logs(tmp_path: Path) -> None:
    def behave(rank: int, reporter: FailureReporter) -> None:
        time.sleep(failure.OTHER_RANKS_POLL_SECONDS + 0.5 if rank == 0 else 0)

    assert run_ranks(tmp_path, 3, behave) == ([0, 0, 0], [])
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_0.log", "rank_1.log", "rank_2.log"]


def test_blocked_ranks_end_when_another_raises(tmp_path: Path) -> None:
    codes, printed = run_ranks(tmp_path, 3, raising(KeyError("weight")))
    assert codes == [1, 1, 1]
    assert printed == ["error on rank 1: KeyError: 'weight'", f"  log of rank 1: {tmp_path}/logs/rank_1.log"]
    assert json.loads((tmp_path / "logs/start_a/first_failure.json").read_text())["rank"] == 1
    assert {(tmp_path / f"note_{rank}").read_text() for rank in range(3)} == {"rank 1: KeyError: 'weight'"}


def test_a_user_error_of_one_rank_is_the_exit_code_of_all(tmp_path: Path) -> None:
    codes, printed = run_ranks(tmp_path, 2, raising(DataError("a.jpg is broken.\nRemove it.")))
    assert codes == [2, 2]
    assert printed[:2] == ["error on rank 1: DataError: a.jpg is broken.", "Remove it."]
    assert len(printed) == 3


@pytest.mark.parametrize("survivors", ["wait", "fail"])
def test_a_killed_rank_is_named_by_one_survivor(tmp_path: Path, survivors: str) -> None:
    def behave(rank: int, reporter: FailureReporter) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if survivors == "wait":
            wait_for_ever()
        time.sleep(0.3)
        raise RuntimeError(CLOSED)

    codes, printed = run_ranks(tmp_path, 4, behave)
    assert codes[1] == -signal.SIGKILL and all(codes)
    assert len(printed) == 2 and printed[0].startswith("error on rank 1: it ended without an error message"), printed
    assert printed[1].endswith("rank_1.log")


def test_a_secondary_failure_waits_for_the_cause(tmp_path: Path) -> None:
    def behave(rank: int, reporter: FailureReporter) -> None:
        reporter.training_started = True
        if rank == 2:
            time.sleep(failure.CAUSE_SECONDS / 2)
            raise ZeroDivisionError
        raise RuntimeError(CLOSED)

    codes, printed = run_ranks(tmp_path, 3, behave)
    assert codes == [1, 1, 1]
    assert printed[0] == "error on rank 2: ZeroDivisionError" and len(printed) == 2


def test_a_secondary_failure_without_a_cause_names_the_ranks_without_one(tmp_path: Path) -> None:
    def behave(rank: int, reporter: FailureReporter) -> None:
        if rank == 2:
            wait_for_ever()
        raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")

    codes, printed = run_ranks(tmp_path, 3, behave)
    assert codes == [1, 1, 1]
    assert len(printed) == 2 and "Timed out waiting" in printed[0] and "(no response from rank 2 on " in printed[0], (
        printed
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_ended_by_a_signal_reports_it_once(tmp_path: Path, number: signal.Signals) -> None:
    """By SIGINT, or by a second SIGTERM."""

    def behave(rank: int, reporter: FailureReporter) -> None:
        if number == signal.SIGTERM:
            ask_to_stop(reporter)
            time.sleep(DUPLICATE_SECONDS + 0.1)
        os.kill(os.getpid(), number)
        wait_for_ever()

    codes, printed = run_ranks(tmp_path, 3, behave)
    assert codes == [128 + number] * 3
    assert len(printed) == 2 and f"ended by {number.name}" in printed[0]
    assert "wait_for_ever" in (tmp_path / "logs/rank_0.log").read_text()


def ask_to_stop(reporter: FailureReporter) -> None:
    """Send SIGTERM to this rank, and wait until it has become a stop request."""
    os.kill(os.getpid(), signal.SIGTERM)
    while not reporter.stop_signals.reason:
        time.sleep(0.01)
    assert reporter.stop_signals.reason == "SIGTERM"


@pytest.mark.parametrize("sigterm_from_scheduler", [False, True])
def test_sigterm_without_a_failure_asks_for_a_stop(tmp_path: Path, sigterm_from_scheduler: bool) -> None:
    def behave(rank: int, reporter: FailureReporter) -> None:
        ask_to_stop(reporter)
        os.kill(os.getpid(), signal.SIGTERM)  # a duplicate, forwarded by a launcher
        time.sleep(failure.CAUSE_SECONDS)

    assert run_ranks(tmp_path, 2, behave, sigterm_from_scheduler=sigterm_from_scheduler) == ([0, 0], [])


def test_sigterm_caused_by_a_failure_ends_a_rank_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "OTHER_RANKS_POLL_SECONDS", 3600.0)  # so that the poll does not find the failure

    def behave(rank: int, reporter: FailureReporter) -> None:
        reporter.training_started = True
        if rank == 1:
            raise ValueError("of rank 1")
        while not reporter.files.first_failure.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_ever()

    codes, printed = run_ranks(tmp_path, 2, behave, sigterm_from_scheduler=True)
    assert codes == [1, 1] and printed[0] == "error on rank 1: ValueError: of rank 1"


def test_a_failure_after_sigterm_ends_a_rank_that_is_stopping(tmp_path: Path) -> None:
    def behave(rank: int, reporter: FailureReporter) -> None:
        ask_to_stop(reporter)
        if rank == 1:
            time.sleep(2 * failure.CAUSE_SECONDS)  # rank 0 has become a stop request, too
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_ever()  # in the collective of the last step

    codes, printed = run_ranks(tmp_path, 2, behave)
    assert codes == [1, -signal.SIGKILL] and printed[0].startswith("error on rank 1: it ended without an error message")


@pytest.mark.parametrize("sigterm_from_scheduler", [False, True])
def test_sigterm_before_the_ranks_have_joined(tmp_path: Path, sigterm_from_scheduler: bool) -> None:
    """One of a scheduler is held; one of another launcher ends a rank, which has nothing to lose yet."""

    def behave() -> bool:
        stop_signals = StopSignals()
        stop_signals.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        FailureReporter(
            RunPaths(tmp_path), 1, 2, stop_signals, start_id="a", sigterm_from_scheduler=sigterm_from_scheduler
        ).begin()
        return stop_signals.reason == "SIGTERM"

    assert exit_code(fork(behave)) == (0 if sigterm_from_scheduler else 128 + signal.SIGTERM)


@pytest.mark.parametrize("training", [False, True])
def test_rank_0_reports_an_error_of_all_ranks(tmp_path: Path, training: bool) -> None:
    def behave(rank: int, reporter: FailureReporter) -> None:
        reporter.training_started = training
        raise ConfigError("that is wrong.")

    codes, printed = run_ranks(tmp_path, 3, behave)
    assert codes == [2, 2, 2]
    assert printed[0] == ("error on rank 0: ConfigError: that is wrong." if training else "error: that is wrong.")
    assert len(printed) == (2 if training else 1)


def test_files_of_an_earlier_attempt_suppress_no_report(tmp_path: Path) -> None:
    logs = tmp_path / "logs/start_a"
    logs.mkdir(parents=True)
    earlier = logs / "first_failure.json"
    earlier.write_text('{"rank": 0, "text": "", "code": 1}')
    os.utime(earlier, (time.time() - 10, time.time() - 10))
    (logs / "rank_2.process").write_text(json.dumps(this_process().__dict__ | {"pid": 2**22 - 1}))
    codes, printed = run_ranks(tmp_path, 2, raising(ValueError("again")))
    assert codes == [1, 1] and printed[0] == "error on rank 1: ValueError: again"


def test_a_single_process_returns_after_one_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, text in (
        (ConfigError("that is wrong."), 2, "error: that is wrong.\n"),
        (OSError("disk\n  gone"), 1, f"error: OSError: disk gone\n  log of rank 0: {tmp_path}/logs/rank_0.log\n"),
    ):
        reporter = FailureReporter(RunPaths(tmp_path), 0, 1, StopSignals(), start_id="a")
        before = signal.getsignal(signal.SIGTERM)
        reporter.begin()
        assert reporter.report(error) == code
        assert capsys.readouterr().err == text
        assert signal.getsignal(signal.SIGTERM) is before


def test_files_of_earlier_starts_are_removed(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    for world_size in (1, 2):
        old = paths.start("old")
        old.path.mkdir(parents=True)
        old.first_failure.write_text("{}")
        reporter = FailureReporter(paths, 0, world_size, StopSignals(), start_id="new")

        def behave(reporter: FailureReporter = reporter, old: Path = old.path) -> bool:
            reporter.begin()
            removed = not old.exists()
            reporter.end()
            return removed

        assert exit_code(fork(behave)) == 0  # in a child, because signal handlers are of the process
        assert paths.starts() == []


def test_a_rank_of_another_start_that_is_alive_is_not_overwritten(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    files = paths.start("a")
    files.path.mkdir(parents=True)
    own = this_process()
    parent = os.getppid()
    ticks = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    content = json.dumps(own.__dict__ | {"pid": parent, "start_ticks": ticks})
    files.process(1).write_text(content)
    with pytest.raises(ConfigError, match=f"is in use: process {parent} on .* is rank 1 of a run"):
        FailureReporter(paths, 1, 2, StopSignals(), start_id="a").begin()
    assert files.process(1).read_text() == content
