"""Signals that ask a run to stop, held until it can.

Launchers import this first of all: the imports that follow take seconds, in which a signal that nobody handles would
end the process. Only the standard library is needed here.
"""

import os
import signal
import time
from typing import Any

DUPLICATE_SECONDS = 2.0
"""A scheduler and a launcher may both pass one SIGTERM on: what comes within this time is the same one."""

LOOK_SECONDS = 0.05


class StopSignals:
    """What this process was told.

    SIGUSR1 asks for a stop: a checkpoint after the next step, then the end. So does SIGTERM; a second one ends the
    process at once. Where there are several ranks, supervise/failure.py takes SIGTERM over: another rank's failure may be
    behind it.
    """

    def __init__(self) -> None:
        self.reason = ""
        """Name of the signal that asks for a stop; empty while none does."""
        self.terminated = False
        """Whether SIGTERM has come."""
        self._first_termination = 0.0

    def listen(self) -> None:
        """Take over both signals, in the main thread."""
        signal.signal(signal.SIGUSR1, self._asked)
        # a process that was started to outlive its terminal goes on ignoring it
        if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, self._told)
        os.register_at_fork(after_in_child=forget)

    def stop(self, reason: str) -> None:
        """Ask for a stop; what asked first is the reason."""
        self.reason = self.reason or reason

    def again(self) -> bool:
        """Whether a SIGTERM that has just come is one more than the first."""
        now = time.monotonic()
        if not self.terminated:
            self.terminated, self._first_termination = True, now
        return now - self._first_termination > DUPLICATE_SECONDS

    def wait(self, seconds: float) -> bool:
        """Wait, but no longer than until SIGTERM comes; whether it came."""
        end = time.monotonic() + seconds
        while not self.terminated and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)
        return self.terminated

    def _asked(self, number: int, _frame: Any) -> None:
        self.stop(signal.Signals(number).name)

    def _told(self, number: int, _frame: Any) -> None:
        if self.again():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.stop(signal.Signals(number).name)


def forget() -> None:
    """In a forked child: it is ended by its parent, and a SIGUSR1 for the whole group is not for it."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
