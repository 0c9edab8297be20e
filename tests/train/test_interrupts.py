"""Signals that ask for a stop, in processes of their own, and the files by which a person does."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aki_megatron.data.loader import _begin_worker
from aki_megatron.supervise import control
from aki_megatron.supervise.control import ControlSignals
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import DUPLICATE_SECONDS, StopSignals
from aki_megatron.types import ControlRequest

ROOT = Path(__file__).resolve().parents[2]


def exit_code(behave: Callable[[StopSignals], object]) -> int:
    """Of a process that listens and behaves so; 0 where ``behave`` returns something true, else 1."""
    child = os.fork()
    if child == 0:
        stop_signals = StopSignals()
        stop_signals.listen()
        os._exit(0 if behave(stop_signals) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_held(number: signal.Signals) -> None:
    def behave(stop_signals: StopSignals) -> bool:
        before = stop_signals.reason
        send(number)
        return before == "" and stop_signals.reason == number.name

    assert exit_code(behave) == 0


def test_the_first_signal_is_the_reason() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        return stop_signals.reason == "SIGUSR1"

    assert exit_code(behave) == 0


def test_the_same_sigterm_twice_is_one_and_a_later_one_ends_the_process() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        time.sleep(DUPLICATE_SECONDS + 0.1)
        send(signal.SIGTERM)
        return True

    assert exit_code(behave) == -signal.SIGTERM
    assert exit_code(lambda stop_signals: (send(signal.SIGTERM), send(signal.SIGTERM))) == 0


def test_a_process_that_ignores_sigterm_goes_on_doing_so() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop_signals.listen()
        send(signal.SIGTERM)
        return not stop_signals.reason

    assert exit_code(behave) == 0


def test_children_are_ended_by_sigterm_and_not_by_sigusr1() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        child = os.fork()
        if child == 0:
            send(signal.SIGUSR1)
            send(signal.SIGTERM)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

    assert exit_code(behave) == 0


@pytest.mark.parametrize("signals", [1, 2])
def test_a_process_that_decodes_leaves_the_first_sigterm_to_its_rank(signals: int) -> None:
    def behave(stop_signals: StopSignals) -> bool:
        child = os.fork()
        if child == 0:
            _begin_worker(0)
            for number in [signal.SIGUSR1] + [signal.SIGTERM] * signals:
                send(number)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (0 if signals == 1 else 128 + signal.SIGTERM)

    assert exit_code(behave) == 0


def test_waiting_ends_when_sigterm_comes() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        waited_in_vain = not stop_signals.wait(0.1)
        send(signal.SIGTERM)
        return waited_in_vain and stop_signals.wait(600.0)

    assert exit_code(behave) == 0


def test_the_launchers_listen_before_they_import_anything_that_takes_long() -> None:
    code = (
        "import os, signal, sys\n"
        "class Asks:\n"  # sends the signal when the first heavy module is looked for
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('pydantic', 'torch', 'yaml'):\n"
        "            os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.meta_path.insert(0, Asks())\n"
        "import runpy\n"
        "sys.argv = ['sft.py', '--help']\n"
        "runpy.run_path('launcher/sft.py', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "--train.steps" in result.stdout, result.stderr
    deaf = code.replace("import runpy", "import pydantic, runpy")
    assert subprocess.run([sys.executable, "-c", deaf], cwd=ROOT, timeout=120).returncode == -signal.SIGUSR1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    monkeypatch.setattr(control, "LOOK_SECONDS", 0.0)
    return RunPaths(tmp_path)


def test_files_are_wishes_of_the_rank_that_looks(folder: RunPaths) -> None:
    ours, others = (ControlSignals(folder, StopSignals(), looks=looks) for looks in (True, False))
    assert (ours(), others()) == (ControlRequest.NONE, ControlRequest.NONE)
    folder.save.touch()
    assert (ours(), others()) == (ControlRequest.SAVE, ControlRequest.NONE)
    folder.stop.touch()
    assert (ours(), others()) == (ControlRequest.SAVE | ControlRequest.STOP, ControlRequest.NONE)
    assert ours.why_stop() == "STOP exists"


def test_a_signal_is_a_wish_of_any_rank(folder: RunPaths) -> None:
    stop_signals = StopSignals()
    ours, others = ControlSignals(folder, stop_signals, looks=False), ControlSignals(folder, StopSignals(), looks=True)
    stop_signals.stop("SIGUSR1")
    assert (ours(), others()) == (ControlRequest.STOP, ControlRequest.NONE)
    assert (ours.why_stop(), others.why_stop()) == ("SIGUSR1", "another rank was asked to stop")


def test_files_are_looked_for_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, now = RunPaths(tmp_path), [100.0]
    monkeypatch.setattr("aki_megatron.supervise.control.time.monotonic", lambda: now[0])
    ours = ControlSignals(folder, StopSignals(), looks=True)
    assert ours() == ControlRequest.NONE
    folder.stop.touch()
    now[0] += 0.9
    assert ours() == ControlRequest.NONE
    now[0] += 0.2
    assert ours() == ControlRequest.STOP
