"""Heartbeats and dog: which rank is named, when, and what is written for the user."""

import ctypes
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

from aki_megatron.config.run import WatchConfig
from aki_megatron.supervise import watchdog
from aki_megatron.supervise.events import read_events
from aki_megatron.supervise.heartbeat import Heartbeat, read_heartbeats
from aki_megatron.supervise.progress import SAVING, STARTING, ProgressTracker
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.watchdog import Watchdog, blocking_function, collective_timeout

LONGEST_SECONDS = 60
QUICK = WatchConfig(step_timeout=1.0, step_timeout_factor=5.0, init_timeout=3600.0)

Behave = Callable[[int, ProgressTracker], None]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watchdog that polls often and waits briefly; a machine under load must still respond in time."""
    monkeypatch.setattr(watchdog, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "RESPONSE_SECONDS", 8.0)
    monkeypatch.setattr(watchdog, "TAKEOVER_SECONDS", 2.0)


def phase_of(paths: RunPaths, rank: int) -> str:
    """Return the phase in the heartbeat of a rank; empty while it is being written."""
    beat = Heartbeat.read(paths.heartbeat(rank))
    return beat.phase if beat else ""


def wait_for_phase(paths: RunPaths, rank: int, phase: str) -> None:
    """Wait until the heartbeat of a rank has this phase."""
    end = time.monotonic() + LONGEST_SECONDS
    while phase_of(paths, rank) != phase:
        assert time.monotonic() < end
        time.sleep(0.01)


def step(tracker: ProgressTracker, number: int) -> None:
    tracker.set_phase("waiting for data")
    tracker.set_phase("forward 0")
    tracker.finish_step(number)


def sleep_in_a_loader() -> None:
    time.sleep(LONGEST_SECONDS)


def run_ranks(paths: RunPaths, count: int, behave: Behave, config: WatchConfig = QUICK) -> list[tuple[int, int, str]]:
    """Run ranks until one reports another or all have ended; return (reporting rank, reported rank, text)."""
    fork = multiprocessing.get_context("fork")
    reports = fork.SimpleQueue()
    meeting = fork.Barrier(count)
    paths.logs.mkdir(parents=True)

    def rank_main(rank: int) -> None:
        def report_rank_failure(other: int, text: str) -> None:
            reports.put((rank, other, text))

        tracker = ProgressTracker(config)
        dog = Watchdog(paths, rank, count, tracker, report_rank_failure)
        dog.begin()
        meeting.wait()
        tracker.start(0)
        for number in range(1, 4):
            step(tracker, number)
        behave(rank, tracker)
        dog.end()

    processes = [fork.Process(target=rank_main, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + LONGEST_SECONDS
    while reports.empty() and any(process.is_alive() for process in processes):
        assert time.monotonic() < end, "no rank was reported"
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    found = []
    while not reports.empty():
        found.append(reports.get())
    return found


def test_a_rank_that_sleeps_while_others_wait_is_the_straggler(tmp_path: Path, quick: None) -> None:
    paths = RunPaths(tmp_path)

    def behave(rank: int, tracker: ProgressTracker) -> None:
        tracker.set_phase("waiting for data")
        if rank == 1:
            sleep_in_a_loader()
        tracker.set_phase("reducing")
        time.sleep(LONGEST_SECONDS)

    ((by, rank, text),) = run_ranks(paths, 3, behave)
    assert (by, rank) == (0, 1), text
    assert text.startswith("hang: no step for ") and "rank 1 on " in text
    assert "is the straggler: in 'waiting for data' for " in text and "after step 3" in text
    stacks = [paths.hang_stacks(number).read_text() for number in range(3)]
    assert "sleep_in_a_loader" in stacks[1] and "sleep_in_a_loader" not in stacks[0] + stacks[2]
    assert all(f"rank {number}: no step for" in text for number, text in enumerate(stacks))
    (event,) = read_events(paths)
    assert event["kind"] == "hang" and event["step"] == 3 and "rank 1" in event["text"]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_whose_heartbeat_stops_is_unresponsive(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    monkeypatch.setattr(watchdog, "RESPONSE_SECONDS", 1.0)
    paths = RunPaths(tmp_path)

    def behave(rank: int, tracker: ProgressTracker) -> None:
        tracker.set_phase("forward 3")
        if rank == stopped:
            wait_for_phase(paths, rank, "forward 3")
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(LONGEST_SECONDS)

    ((by, rank, text),) = run_ranks(paths, 2, behave)
    assert (by, rank) == (1 - stopped, stopped), "the lowest live rank reports"
    assert f"rank {stopped} is unresponsive" in text and "was last seen in 'forward 3' after step 3" in text


def test_a_rank_that_never_started_is_named(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "RESPONSE_SECONDS", 1.0)
    paths = RunPaths(tmp_path)
    paths.logs.mkdir()
    reported: list[tuple[int, str]] = []
    dog = Watchdog(
        paths, 0, 2, ProgressTracker(WatchConfig(step_timeout=0.1, init_timeout=0.1)), lambda *a: reported.append(a)
    )
    dog.begin()
    end = time.monotonic() + LONGEST_SECONDS
    while not reported and time.monotonic() < end:
        time.sleep(0.05)
    dog.end()
    assert reported[0][0] == 1 and "rank 1 never started" in reported[0][1]


def test_stacks_are_written_though_native_code_holds_the_interpreter(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "RESPONSE_SECONDS", 1.0)
    paths = RunPaths(tmp_path)

    def sleep_in_native_code(rank: int, tracker: ProgressTracker) -> None:
        tracker.set_phase("forward 0")
        wait_for_phase(paths, rank, "forward 0")
        ctypes.PyDLL(None).sleep(4)  # unlike CDLL it does not let other threads run

    run_ranks(paths, 1, sleep_in_native_code)
    at_once, _, _ = paths.hang_stacks(0).read_text().partition("rank 0: no step for")  # what the watchdog writes later
    assert at_once.startswith("Timeout (") and "sleep_in_native_code" in at_once


def test_ranks_that_step_or_save_are_not_reported(tmp_path: Path, quick: None) -> None:
    paths = RunPaths(tmp_path)

    def behave(rank: int, tracker: ProgressTracker) -> None:
        tracker.set_phase(SAVING)
        time.sleep(1.5)  # longer than step_timeout
        for number in range(4, 10):
            step(tracker, number)
            time.sleep(0.1)

    assert run_ranks(paths, 2, behave) == []
    assert not paths.events.exists() and not paths.hang.exists()
    assert list(paths.logs.iterdir()) == [], "no empty stack files are left"


def test_a_hang_of_an_earlier_attempt_is_ignored(tmp_path: Path, quick: None) -> None:
    paths = RunPaths(tmp_path)
    paths.heartbeats.mkdir()
    paths.hang.touch()
    Heartbeat(7, 1, "forward 0", 0.0, hang_detected=True).write(paths.heartbeat(7))
    for path in (paths.hang, paths.heartbeat(7)):
        os.utime(path, (time.time() - 60, time.time() - 60))

    def behave(rank: int, tracker: ProgressTracker) -> None:
        if rank == 0:  # the rank that removes it is late
            time.sleep(0.5)

    assert run_ranks(paths, 2, behave) == []
    assert [path.name for path in paths.heartbeats.iterdir() if "7" in path.name] == []


def test_a_full_disk_does_not_end_the_watchdog(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(tmp_path)
    paths.logs.mkdir()
    reported: list[tuple[int, str]] = []
    tracker = ProgressTracker(WatchConfig(step_timeout=0.5, init_timeout=0.5))
    dog = Watchdog(paths, 0, 1, tracker, lambda *report: reported.append(report))
    dog.begin()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_text", "touch", "open"):
        monkeypatch.setattr(Path, name, full)
    end = time.monotonic() + LONGEST_SECONDS
    while not reported and time.monotonic() < end:
        time.sleep(0.05)
    monkeypatch.undo()
    dog.end()
    assert reported[0][0] == 0 and "rank 0 on " in reported[0][1]


def test_heartbeats_hold_step_and_phase(tmp_path: Path, quick: None) -> None:
    paths = RunPaths(tmp_path)
    paths.logs.mkdir()
    tracker = ProgressTracker(QUICK)
    dog = Watchdog(paths, 0, 1, tracker, lambda *_: None)
    dog.begin()
    assert json.loads(paths.heartbeat(0).read_text())["phase"] == STARTING
    tracker.start(4)
    step(tracker, 5)
    tracker.set_phase("backward 2")
    wait_for_phase(paths, 0, "backward 2")
    dog.end()
    beat = read_heartbeats(paths, 1)[0]
    assert (beat.rank, beat.step, beat.phase, beat.pid) == (0, 5, "backward 2", os.getpid())
    assert 0 <= beat.time - beat.since < LONGEST_SECONDS


def test_the_function_in_which_a_thread_waits_is_found() -> None:
    names = {}
    for module, function in (("torch.distributed.distributed_c10d", "all_reduce"), ("elsewhere", "all_reduce")):
        scope = {"__name__": module, "lock": threading.Lock()}
        exec(f"def {function}():\n    lock.acquire()\n", scope)
        scope["lock"].acquire()
        thread = threading.Thread(target=scope[function], daemon=True)
        thread.start()
        time.sleep(0.05)
        names[module] = blocking_function(sys._current_frames()[thread.ident or 0])
        scope["lock"].release()
    assert names == {"torch.distributed.distributed_c10d": "all_reduce", "elsewhere": ""}
    assert dist.all_reduce.__module__ == "torch.distributed.distributed_c10d", "update BLOCKING_MODULES"


def test_collectives_time_out_after_the_watchdog() -> None:
    assert collective_timeout(WatchConfig(init_timeout=600.0)) > 600
