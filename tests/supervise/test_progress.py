"""ProgressTracker: the median duration of a step, and the timeout that follows from it."""

import time

import pytest

from aki_megatron.config.run import WatchConfig
from aki_megatron.supervise.progress import SAVING, ProgressTracker


def test_the_timeout_follows_the_median_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tracker = ProgressTracker(WatchConfig(step_timeout_factor=20.0, step_timeout=60.0, init_timeout=600.0))
    tracker.start(0)
    tracker.set_phase("waiting for data")
    assert tracker.timeout == 600, "the first step may take long"
    durations = [100.0, 8.0, 8.0, 30.0, 30.0]
    for number, seconds in enumerate(durations, 1):
        now[0] += seconds
        tracker.finish_step(number)
    assert tracker.step_seconds == 19.0 and tracker.timeout == 380.0, "the first step is not in the median"
    tracker.set_phase(SAVING)
    now[0] += 300
    assert tracker.timeout == 600 and tracker.elapsed == 300
    tracker.set_phase("waiting for data")
    assert tracker.timeout == 380 and tracker.elapsed == 0, "a checkpoint is no part of a step"
    now[0] += 7
    tracker.finish_step(6)
    assert tracker.step_seconds == 8.0, "it would be 30 with the checkpoint"
    now[0] += 5000
    tracker.add_grace(4990)
    assert tracker.elapsed == 10
    for number in range(7, 60):
        now[0] += 100
        tracker.finish_step(number)
    assert tracker.timeout == 600, "nothing may take longer than init_timeout"
