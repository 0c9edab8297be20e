"""Signals that ask for a stop, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import exit_code, fork

from aki_megatron.data.loader import init_worker
from aki_megatron.supervise.signals import DUPLICATE_SECONDS, StopSignals

ROOT = Path(__file__).resolve().parents[2]


def listening(behave: Callable[[StopSignals], object]) -> int:
    """Run ``behave`` in a process that listens; return its exit code: 0 where ``behave`` returns a true value."""

    def run() -> object:
        stop_signals = StopSignals()
        stop_signals.listen()
        return behave(stop_signals)

    return exit_code(fork(run))


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_held(number: signal.Signals) -> None:
    def behave(stop_signals: StopSignals) -> bool:
        before = stop_signals.reason
        send(number)
        return before == "" and stop_signals.reason == number.name

    assert listening(behave) == 0


def test_the_first_signal_is_the_reason() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        return stop_signals.reason == "SIGUSR1"

    assert listening(behave) == 0


def test_duplicate_sigterms_count_once_and_a_later_one_ends_the_process() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        time.sleep(DUPLICATE_SECONDS + 0.1)
        send(signal.SIGTERM)
        return True

    assert listening(behave) == -signal.SIGTERM
    assert listening(lambda stop_signals: (send(signal.SIGTERM), send(signal.SIGTERM))) == 0


def interrupted(action: Callable[[], object]) -> bool:
    """Return whether ``action`` raises KeyboardInterrupt."""
    try:
        action()
    except KeyboardInterrupt:
        return True
    return False


def test_ctrl_c_stops_once_and_a_later_one_ends_the_process() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        first = interrupted(lambda: send(signal.SIGINT))
        duplicate = interrupted(lambda: send(signal.SIGINT))  # forwarded by a launcher, while the run ends in order
        if not first or duplicate or stop_signals.reason:
            return False
        time.sleep(DUPLICATE_SECONDS + 0.1)
        send(signal.SIGINT)
        return False

    assert listening(behave) == -signal.SIGINT


def test_a_process_that_ignores_sigint_keeps_ignoring_it() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stop_signals.listen()
        return not interrupted(lambda: send(signal.SIGINT))

    assert listening(behave) == 0


def test_a_process_that_ignores_sigterm_keeps_ignoring_it() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stop_signals.listen()
        send(signal.SIGTERM)
        return not stop_signals.reason

    assert listening(behave) == 0


def test_children_are_ended_by_sigterm_only() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        signals = (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
        return exit_code(fork(lambda: [send(number) for number in signals])) == -signal.SIGTERM

    assert listening(behave) == 0


@pytest.mark.parametrize("by_rank", [False, True])
def test_a_loader_process_obeys_the_sigterm_of_its_rank_only(by_rank: bool) -> None:
    def behave(stop_signals: StopSignals) -> bool:
        ready, done = os.pipe()

        def work() -> bool:
            init_worker(0)
            send(signal.SIGUSR1)
            send(signal.SIGTERM)  # not from its rank
            os.write(done, b"1")
            time.sleep(60 if by_rank else 0)
            return True

        child = fork(work)
        os.read(ready, 1)
        if by_rank:
            os.kill(child, signal.SIGTERM)
        return exit_code(child) == (128 + signal.SIGTERM if by_rank else 0)

    assert listening(behave) == 0


def test_wait_ends_when_sigterm_arrives() -> None:
    def behave(stop_signals: StopSignals) -> bool:
        timed_out = not stop_signals.wait(0.1)
        send(signal.SIGTERM)
        return timed_out and stop_signals.wait(600.0)

    assert listening(behave) == 0


def test_launchers_listen_before_slow_imports() -> None:
    code = (
        "import os, signal, sys\n"
        "class SendSignal:\n"  # when the first slow module is looked for
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('pydantic', 'torch', 'yaml'):\n"
        "            os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.meta_path.insert(0, SendSignal())\n"
        "import runpy\n"
        "sys.argv = ['sft.py', '--help']\n"
        "runpy.run_path('launcher/sft.py', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "--train.steps" in result.stdout, result.stderr
    too_early = code.replace("import runpy", "import pydantic, runpy")
    assert subprocess.run([sys.executable, "-c", too_early], cwd=ROOT, timeout=120).returncode == -signal.SIGUSR1
