"""Heartbeats, and ranks that stop stepping: who is named, when, and what is left for a person to read."""

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
from aki_megatron.supervise.heartbeat import Heartbeat, lagging, read_heartbeats
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.watchdog import ProgressTracker, Watchdog, collective_seconds, waits_in
from aki_megatron.types import StepReport

LONGEST_SECONDS = 60
QUICK = WatchConfig(step_timeout=1.0, step_timeout_factor=5.0, init_timeout=3600.0)

Behave = Callable[[int, ProgressTracker], None]


def report() -> StepReport:
    numbers = {"supervised_tokens": 1, "tokens": 1, "places": 1, "images": 0, "bad_samples": 0}
    return StepReport(loss=1.0, grad_norm=1.0, lr=0.1, seconds=0.1, skipped=False, **numbers)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch that looks often and waits briefly; a machine under load must still answer in time."""
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 8.0)
    monkeypatch.setattr(watchdog, "DEPUTY_SECONDS", 2.0)


def place_of(folder: RunPaths, rank: int) -> str:
    """Where the heartbeat of a rank says that it is; empty while it is being written."""
    beat = Heartbeat.read(folder.heartbeat(rank))
    return beat.place if beat else ""


def wait_for_place(folder: RunPaths, rank: int, place: str) -> None:
    """Wait until the heartbeat of a rank says so."""
    end = time.monotonic() + LONGEST_SECONDS
    while place_of(folder, rank) != place:
        assert time.monotonic() < end
        time.sleep(0.01)


def step(pulse: ProgressTracker, number: int) -> None:
    pulse.at("waits for data")
    pulse.at("forward 0")
    pulse.after_step(number, report())


def sleep_in_a_loader() -> None:
    time.sleep(LONGEST_SECONDS)


def run_ranks(folder: RunPaths, count: int, behave: Behave, config: WatchConfig = QUICK) -> list[tuple[int, int, str]]:
    """Ranks that behave so, until one accuses another or all have ended: who accused whom, and of what."""
    fork = multiprocessing.get_context("fork")
    accusations = fork.SimpleQueue()
    meeting = fork.Barrier(count)
    folder.logs.mkdir(parents=True)

    def rank_main(rank: int) -> None:
        def accuse(other: int, text: str) -> None:
            accusations.put((rank, other, text))

        pulse = ProgressTracker(config)
        hangs = Watchdog(folder, rank, count, pulse, accuse)
        hangs.begin()
        meeting.wait()
        pulse.on_start(0)
        for number in range(1, 4):
            step(pulse, number)
        behave(rank, pulse)
        hangs.end()

    processes = [fork.Process(target=rank_main, args=(rank,)) for rank in range(count)]
    for process in processes:
        process.start()
    end = time.monotonic() + LONGEST_SECONDS
    while accusations.empty() and any(process.is_alive() for process in processes):
        assert time.monotonic() < end, "nobody was accused"
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.join()
    found = []
    while not accusations.empty():
        found.append(accusations.get())
    return found


def test_a_rank_that_sleeps_while_others_wait_is_named(tmp_path: Path, quick: None) -> None:
    folder = RunPaths(tmp_path)

    def behave(rank: int, pulse: ProgressTracker) -> None:
        pulse.at("waits for data")
        if rank == 1:
            sleep_in_a_loader()
        pulse.at("reduces")
        time.sleep(LONGEST_SECONDS)

    ((by, rank, text),) = run_ranks(folder, 3, behave)
    assert (by, rank) == (0, 1), text
    assert text.startswith("hang: no step for ") and "rank 1 on " in text
    assert "lags: in 'waits for data' for " in text and "after step 3" in text
    stacks = [folder.hang_stacks(number).read_text() for number in range(3)]
    assert "sleep_in_a_loader" in stacks[1] and "sleep_in_a_loader" not in stacks[0] + stacks[2]
    assert all(f"rank {number}: no step for" in text for number, text in enumerate(stacks))
    (event,) = read_events(folder)
    assert event["kind"] == "hang" and event["step"] == 3 and "rank 1" in event["text"]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_whose_heartbeat_stops_is_silent(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch, stopped: int
) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 1.0)
    folder = RunPaths(tmp_path)

    def behave(rank: int, pulse: ProgressTracker) -> None:
        pulse.at("forward 3")
        if rank == stopped:
            wait_for_place(folder, rank, "forward 3")
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(LONGEST_SECONDS)

    ((by, rank, text),) = run_ranks(folder, 2, behave)
    assert (by, rank) == (1 - stopped, stopped), "the lowest rank that lives speaks"
    assert f"rank {stopped} is silent" in text and "was last seen in 'forward 3' after step 3" in text


def test_a_rank_that_never_started_is_named(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 1.0)
    folder = RunPaths(tmp_path)
    folder.logs.mkdir()
    said: list[tuple[int, str]] = []
    hangs = Watchdog(
        folder, 0, 2, ProgressTracker(WatchConfig(step_timeout=0.1, init_timeout=0.1)), lambda *a: said.append(a)
    )
    hangs.begin()
    end = time.monotonic() + LONGEST_SECONDS
    while not said and time.monotonic() < end:
        time.sleep(0.05)
    hangs.end()
    assert said[0][0] == 1 and "rank 1 never started" in said[0][1]


def test_stacks_are_written_though_native_code_keeps_the_interpreter(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "ANSWER_SECONDS", 1.0)
    folder = RunPaths(tmp_path)

    def sleep_in_native_code(rank: int, pulse: ProgressTracker) -> None:
        pulse.at("forward 0")
        wait_for_place(folder, rank, "forward 0")
        ctypes.PyDLL(None).sleep(4)  # unlike CDLL it does not let other threads run

    run_ranks(folder, 1, sleep_in_native_code)
    at_once, _, _ = folder.hang_stacks(0).read_text().partition("rank 0: no step for")  # what the watch writes later
    assert at_once.startswith("Timeout (") and "sleep_in_native_code" in at_once


def test_ranks_that_step_or_save_are_left_alone(tmp_path: Path, quick: None) -> None:
    folder = RunPaths(tmp_path)

    def behave(rank: int, pulse: ProgressTracker) -> None:
        pulse.at("saves a checkpoint")
        time.sleep(1.5)  # longer than step_timeout
        for number in range(4, 10):
            step(pulse, number)
            time.sleep(0.1)

    assert run_ranks(folder, 2, behave) == []
    assert not folder.events.exists() and not folder.hang.exists()
    assert list(folder.logs.iterdir()) == [], "no empty files of stacks are left"


def test_a_hang_of_an_earlier_attempt_is_over(tmp_path: Path, quick: None) -> None:
    folder = RunPaths(tmp_path)
    folder.heartbeats.mkdir()
    folder.hang.touch()
    Heartbeat(7, 1, "forward 0", 0.0, hang_noticed=True).write(folder.heartbeat(7))
    for path in (folder.hang, folder.heartbeat(7)):
        os.utime(path, (time.time() - 60, time.time() - 60))

    def behave(rank: int, pulse: ProgressTracker) -> None:
        if rank == 0:  # the rank that removes it comes late
            time.sleep(0.5)

    assert run_ranks(folder, 2, behave) == []
    assert [path.name for path in folder.heartbeats.iterdir() if "7" in path.name] == []


def test_a_full_disk_ends_no_watch(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunPaths(tmp_path)
    folder.logs.mkdir()
    said: list[tuple[int, str]] = []
    pulse = ProgressTracker(WatchConfig(step_timeout=0.5, init_timeout=0.5))
    hangs = Watchdog(folder, 0, 1, pulse, lambda *accusation: said.append(accusation))
    hangs.begin()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("write_text", "touch", "open"):
        monkeypatch.setattr(Path, name, full)
    end = time.monotonic() + LONGEST_SECONDS
    while not said and time.monotonic() < end:
        time.sleep(0.05)
    monkeypatch.undo()
    hangs.end()
    assert said[0][0] == 0 and "rank 0 on " in said[0][1]


def test_heartbeats_say_where_a_rank_is(tmp_path: Path, quick: None) -> None:
    folder = RunPaths(tmp_path)
    folder.logs.mkdir()
    pulse = ProgressTracker(QUICK)
    hangs = Watchdog(folder, 0, 1, pulse, lambda *_: None)
    hangs.begin()
    assert json.loads(folder.heartbeat(0).read_text())["place"] == "starts"
    pulse.on_start(4)
    step(pulse, 5)
    pulse.at("backward 2")
    wait_for_place(folder, 0, "backward 2")
    hangs.end()
    beat = read_heartbeats(folder, 1)[0]
    assert (beat.rank, beat.step, beat.place, beat.pid) == (0, 5, "backward 2", os.getpid())
    assert 0 <= beat.time - beat.since < LONGEST_SECONDS


def test_what_is_allowed_follows_the_median_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pulse = ProgressTracker(WatchConfig(step_timeout_factor=20.0, step_timeout=60.0, init_timeout=600.0))
    pulse.on_start(0)
    pulse.at("waits for data")
    assert pulse.allowed == 600, "the first step may take long"
    durations = [100.0, 8.0, 8.0, 30.0, 30.0]
    for number, seconds in enumerate(durations, 1):
        now[0] += seconds
        pulse.after_step(number, report())
    assert pulse.step_seconds == 19.0 and pulse.allowed == 380.0, "the first step counts for nothing"
    pulse.at("saves a checkpoint")
    now[0] += 300
    assert pulse.allowed == 600 and pulse.passed == 300
    pulse.at("waits for data")
    assert pulse.allowed == 380 and pulse.passed == 0, "a checkpoint is no part of a step"
    now[0] += 7
    pulse.after_step(6, report())
    assert pulse.step_seconds == 8.0, "it would be 30 with the checkpoint"
    now[0] += 5000
    pulse.forgive(4990)
    assert pulse.passed == 10
    for number in range(7, 60):
        now[0] += 100
        pulse.after_step(number, report())
    assert pulse.allowed == 600, "nothing may take longer than init_timeout"
    assert collective_seconds(WatchConfig(init_timeout=600.0)) > 600


def test_who_lags_has_the_fewest_steps_or_waits_for_nobody_or_came_least_far_or_came_first() -> None:
    def beat(rank: int, step: int, since: float, moves: int = 3, waits: str = "") -> Heartbeat:
        return Heartbeat(rank, step, "forward 0", since, moves, waits=waits)

    assert lagging([beat(0, 5, 1.0), beat(1, 4, 9.0, 8, "all_reduce")]).rank == 1
    assert lagging([beat(0, 5, 1.0, 2, "all_reduce"), beat(1, 5, 9.0)]).rank == 1
    assert lagging([beat(0, 5, 1.0, 4), beat(1, 5, 9.0)]).rank == 1
    assert lagging([beat(0, 5, 3.0), beat(1, 5, 2.0), beat(2, 5, 9.0)]).rank == 1


def test_a_thread_in_a_collective_is_known_to_wait() -> None:
    names = {}
    for module, function in (("torch.distributed.distributed_c10d", "all_reduce"), ("elsewhere", "all_reduce")):
        scope = {"__name__": module, "lock": threading.Lock()}
        exec(f"def {function}():\n    lock.acquire()\n", scope)
        scope["lock"].acquire()
        thread = threading.Thread(target=scope[function], daemon=True)
        thread.start()
        time.sleep(0.05)
        names[module] = waits_in(sys._current_frames()[thread.ident or 0])
        scope["lock"].release()
    assert names == {"torch.distributed.distributed_c10d": "all_reduce", "elsewhere": ""}
    assert dist.all_reduce.__module__ == "torch.distributed.distributed_c10d", "torch has moved it: see watch.WAITS"
