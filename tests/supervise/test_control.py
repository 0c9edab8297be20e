"""Requests to a run: by signals, and by files that the user creates."""

from pathlib import Path

import pytest

from aki_megatron.errors import DataError
from aki_megatron.supervise import control
from aki_megatron.supervise.control import ControlSignals
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.types import ControlRequest


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setattr(control, "POLL_SECONDS", 0.0)
    return RunPaths(tmp_path)


def test_a_failure_that_another_thread_found_ends_training_at_the_next_step(paths: RunPaths) -> None:
    stop_signals = StopSignals()
    signals = ControlSignals(paths, stop_signals, checks_files=True)
    signals.poll()
    stop_signals.failure = "the run folder is gone"
    with pytest.raises(DataError, match="^the run folder is gone$"):
        signals.poll()


def test_files_are_requests_of_the_rank_that_checks_them(paths: RunPaths) -> None:
    ours, others = (ControlSignals(paths, StopSignals(), checks_files=checks) for checks in (True, False))
    assert (ours.poll(), others.poll()) == (ControlRequest.NONE, ControlRequest.NONE)
    paths.save.touch()
    assert (ours.poll(), others.poll()) == (ControlRequest.SAVE, ControlRequest.NONE)
    paths.stop.touch()
    assert (ours.poll(), others.poll()) == (ControlRequest.SAVE | ControlRequest.STOP, ControlRequest.NONE)
    assert ours.stop_reason() == "STOP exists"


def test_a_signal_is_a_request_of_any_rank(paths: RunPaths) -> None:
    stop_signals = StopSignals()
    ours, others = (
        ControlSignals(paths, stop_signals, checks_files=False),
        ControlSignals(paths, StopSignals(), checks_files=True),
    )
    stop_signals.request_stop("SIGUSR1")
    assert (ours.poll(), others.poll()) == (ControlRequest.STOP, ControlRequest.NONE)
    assert (ours.stop_reason(), others.stop_reason()) == ("SIGUSR1", "another rank was asked to stop")


def test_files_are_checked_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, now = RunPaths(tmp_path), [100.0]
    monkeypatch.setattr("aki_megatron.supervise.control.time.monotonic", lambda: now[0])
    ours = ControlSignals(paths, StopSignals(), checks_files=True)
    assert ours.poll() == ControlRequest.NONE
    paths.stop.touch()
    now[0] += 0.9
    assert ours.poll() == ControlRequest.NONE
    now[0] += 0.2
    assert ours.poll() == ControlRequest.STOP
