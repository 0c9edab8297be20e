"""Ranks without a launcher: whatever ends one of them, all end, and one message names the first."""

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
import torch.distributed as dist

from aki_megatron.errors import ConfigError, DataError, UserError
from aki_megatron.supervise import failure
from aki_megatron.supervise.failure import FailureReporter, describe, is_echo, leave
from aki_megatron.supervise.process import Process, is_alive, this_process
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import DUPLICATE_SECONDS, StopSignals

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:15558."
LONGEST_SECONDS = 20

Behave = Callable[[int, FailureReporter], None]


def wait_for_ever() -> None:
    """Like a collective whose other end is gone: nothing stop_signals it."""
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def run_ranks(folder: Path, count: int, behave: Behave, *, by_scheduler: bool = False) -> tuple[list[int], list[str]]:
    """Exit codes of ``count`` processes that behave so, and the lines they wrote to stderr."""
    fork = multiprocessing.get_context("fork")
    meeting, said = fork.Barrier(count), folder / "stderr"

    def rank_main(rank: int) -> None:
        sys.stderr = said.open("a")
        stop_signals = StopSignals()
        stop_signals.listen()
        watch = FailureReporter(
            RunPaths(folder),
            rank,
            count,
            stop_signals,
            by_scheduler=by_scheduler,
            note=lambda text: (folder / f"note_{rank}").write_text(text),
        )
        watch.begin()
        meeting.wait()
        watch.joined()
        meeting.wait()
        try:
            behave(rank, watch)
            meeting.wait()
        except BaseException as error:
            leave(watch.folder, rank, watch.failed(error))
        watch.end()
        os._exit(0)

    processes = [fork.Process(target=rank_main, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + LONGEST_SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert late == [], f"ranks {late} did not end"
    codes = [process.exitcode for process in processes]
    assert None not in codes
    return [code or 0 for code in codes], said.read_text().splitlines() if said.exists() else []


def raising(error: BaseException) -> Behave:
    def behave(rank: int, watch: FailureReporter) -> None:
        watch.training = True
        if rank == 1:
            raise error
        wait_for_ever()

    return behave


def test_a_good_end_leaves_no_traces(tmp_path: Path) -> None:
    def behave(rank: int, watch: FailureReporter) -> None:
        time.sleep(failure.POLL_SECONDS + 0.5 if rank == 0 else 0)

    assert run_ranks(tmp_path, 3, behave) == ([0, 0, 0], [])
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["rank_0.log", "rank_1.log", "rank_2.log"]


def test_ranks_that_wait_for_ever_end_when_another_raises(tmp_path: Path) -> None:
    codes, said = run_ranks(tmp_path, 3, raising(KeyError("weight")))
    assert codes == [1, 1, 1]
    assert said == ["error on rank 1: KeyError: 'weight'", f"  log of rank 1: {tmp_path}/logs/rank_1.log"]
    assert json.loads((tmp_path / "logs/first_failure.json").read_text())["rank"] == 1
    assert {(tmp_path / f"note_{rank}").read_text() for rank in range(3)} == {"rank 1: KeyError: 'weight'"}


def test_a_mistake_of_one_rank_has_the_exit_code_of_a_mistake_everywhere(tmp_path: Path) -> None:
    codes, said = run_ranks(tmp_path, 2, raising(DataError("a.jpg is broken.\nRemove it.")))
    assert codes == [2, 2]
    assert said[:2] == ["error on rank 1: DataError: a.jpg is broken.", "Remove it."]
    assert len(said) == 3


@pytest.mark.parametrize("survivors", ["wait", "fail"])
def test_a_killed_rank_is_named_by_one_survivor(tmp_path: Path, survivors: str) -> None:
    def behave(rank: int, watch: FailureReporter) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if survivors == "wait":
            wait_for_ever()
        time.sleep(0.3)
        raise RuntimeError(CLOSED)

    codes, said = run_ranks(tmp_path, 4, behave)
    assert codes[1] == -signal.SIGKILL and all(codes)
    assert len(said) == 2 and said[0].startswith("error on rank 1: it ended without a word"), said
    assert said[1].endswith("rank_1.log")


def test_an_echo_waits_for_the_cause(tmp_path: Path) -> None:
    def behave(rank: int, watch: FailureReporter) -> None:
        watch.training = True
        if rank == 2:
            time.sleep(failure.PATIENCE_SECONDS / 2)
            raise ZeroDivisionError
        raise RuntimeError(CLOSED)

    codes, said = run_ranks(tmp_path, 3, behave)
    assert codes == [1, 1, 1]
    assert said[0] == "error on rank 2: ZeroDivisionError" and len(said) == 2


def test_ranks_that_wait_in_vain_say_who_was_not_heard_of(tmp_path: Path) -> None:
    def behave(rank: int, watch: FailureReporter) -> None:
        if rank == 2:
            wait_for_ever()
        raise RuntimeError("Timed out waiting 600000ms for recv operation to complete")

    codes, said = run_ranks(tmp_path, 3, behave)
    assert codes == [1, 1, 1]
    assert len(said) == 2 and "Timed out waiting" in said[0] and "(not heard of: rank 2 on " in said[0], said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_end_says_so_once(tmp_path: Path, number: signal.Signals) -> None:
    """By SIGINT, or by a second SIGTERM."""

    def behave(rank: int, watch: FailureReporter) -> None:
        if number == signal.SIGTERM:
            ask_to_stop(watch)
            time.sleep(DUPLICATE_SECONDS + 0.1)
        os.kill(os.getpid(), number)
        wait_for_ever()

    codes, said = run_ranks(tmp_path, 3, behave)
    assert codes == [128 + number] * 3
    assert len(said) == 2 and f"told to end by {number.name}" in said[0]
    assert "wait_for_ever" in (tmp_path / "logs/rank_0.log").read_text()


def ask_to_stop(watch: FailureReporter) -> None:
    """Send SIGTERM to this rank, and wait until it has become a wish to stop."""
    os.kill(os.getpid(), signal.SIGTERM)
    while not watch.stop_signals.reason:
        time.sleep(0.01)
    assert watch.stop_signals.reason == "SIGTERM"


@pytest.mark.parametrize("by_scheduler", [False, True])
def test_sigterm_that_no_failure_is_behind_asks_for_a_stop(tmp_path: Path, by_scheduler: bool) -> None:
    def behave(rank: int, watch: FailureReporter) -> None:
        ask_to_stop(watch)
        os.kill(os.getpid(), signal.SIGTERM)  # of the same stop, passed on by a launcher
        time.sleep(failure.PATIENCE_SECONDS)

    assert run_ranks(tmp_path, 2, behave, by_scheduler=by_scheduler) == ([0, 0], [])


def test_sigterm_that_a_failure_is_behind_ends_a_rank_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failure, "POLL_SECONDS", 3600.0)  # it would not find out by itself

    def behave(rank: int, watch: FailureReporter) -> None:
        watch.training = True
        if rank == 1:
            raise ValueError("of rank 1")
        while not watch.folder.first_failure.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_ever()

    codes, said = run_ranks(tmp_path, 2, behave, by_scheduler=True)
    assert codes == [1, 1] and said[0] == "error on rank 1: ValueError: of rank 1"


def test_a_failure_after_sigterm_ends_a_rank_that_wanted_to_stop(tmp_path: Path) -> None:
    def behave(rank: int, watch: FailureReporter) -> None:
        ask_to_stop(watch)
        if rank == 1:
            time.sleep(2 * failure.PATIENCE_SECONDS)  # rank 0 has come to the same conclusion
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for_ever()  # in the collective of the last step

    codes, said = run_ranks(tmp_path, 2, behave)
    assert codes == [1, -signal.SIGKILL] and said[0].startswith("error on rank 1: it ended without a word")


@pytest.mark.parametrize("by_scheduler", [False, True])
def test_sigterm_before_the_ranks_have_met(tmp_path: Path, by_scheduler: bool) -> None:
    """A scheduler's is held; another launcher's ends a rank that has nothing to lose yet."""
    child = os.fork()
    if child == 0:
        stop_signals = StopSignals()
        stop_signals.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        FailureReporter(RunPaths(tmp_path), 1, 2, stop_signals, by_scheduler=by_scheduler).begin()
        os._exit(0 if stop_signals.reason == "SIGTERM" else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (0 if by_scheduler else 128 + signal.SIGTERM)


@pytest.mark.parametrize("training", [False, True])
def test_rank_0_says_what_all_meet_alike(tmp_path: Path, training: bool) -> None:
    def behave(rank: int, watch: FailureReporter) -> None:
        watch.training = training
        raise ConfigError("that is wrong.")

    codes, said = run_ranks(tmp_path, 3, behave)
    assert codes == [2, 2, 2]
    assert said[0] == ("error on rank 0: ConfigError: that is wrong." if training else "error: that is wrong.")
    assert len(said) == (2 if training else 1)


def test_what_an_earlier_attempt_left_silences_nobody(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    earlier = logs / "first_failure.json"
    earlier.write_text('{"rank": 0, "text": "", "code": 1}')
    os.utime(earlier, (time.time() - 10, time.time() - 10))
    (logs / "rank_2.process").write_text(json.dumps(this_process().__dict__ | {"pid": 2**22 - 1}))
    codes, said = run_ranks(tmp_path, 2, raising(ValueError("again")))
    assert codes == [1, 1] and said[0] == "error on rank 1: ValueError: again"


def test_one_process_returns_after_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, text in (
        (ConfigError("that is wrong."), 2, "error: that is wrong.\n"),
        (OSError("disk\n  gone"), 1, f"error: OSError: disk gone\n  log of rank 0: {tmp_path}/logs/rank_0.log\n"),
    ):
        watch = FailureReporter(RunPaths(tmp_path), 0, 1, StopSignals())
        before = signal.getsignal(signal.SIGTERM)
        watch.begin()
        assert watch.failed(error) == code
        assert capsys.readouterr().err == text
        assert signal.getsignal(signal.SIGTERM) is before


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "echo"),
    [
        (RuntimeError(CLOSED), True),
        (RuntimeError("Timed out waiting 600000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1"), True),
        (dist.DistNetworkError("The client socket has timed out"), True),
        (caused(DataError("cannot save"), RuntimeError(CLOSED)), True),
        (caused(DataError("cannot save"), OSError("no space left on device")), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionRefusedError("Connection refused"), False),
        (BrokenPipeError("Broken pipe"), False),
        (MemoryError(), False),
    ],
)
def test_echoes_are_told_from_causes(error: BaseException, echo: bool) -> None:
    assert is_echo(error) == echo


def test_errors_take_one_line() -> None:
    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert describe(MemoryError()) == "MemoryError"
    assert describe(UserError("a\nb")) == "UserError: a\nb"
    assert len(describe(ValueError("x" * 10000))) < 700


def test_who_is_alive(tmp_path: Path) -> None:
    me = this_process()
    assert is_alive(me)
    assert not is_alive(Process(me.host, me.machine, me.pid, me.started + 1)), "another process has its number now"
    assert is_alive(Process("elsewhere", "another boot", 2**22 - 1, 0)), "what cannot be known is no death"
    child = os.fork()
    if child == 0:
        this_process().write(tmp_path / "child")
        os._exit(0)
    while (written := Process.read(tmp_path / "child")) is None:
        time.sleep(0.01)
    time.sleep(0.1)
    assert not is_alive(written), "it has ended, though nobody has waited for it"
    os.waitpid(child, 0)
    assert not is_alive(written)
