"""Signals that ask a run to stop, held until the run can.

Launchers import this before anything else: the imports that follow take seconds, in which an unhandled signal would
end the process. Standard library only.
"""

import os
import signal
import time
from typing import Any

DUPLICATE_SECONDS = 2.0
"""A scheduler and a launcher may both forward one SIGTERM: those that arrive within this time count as one."""

POLL_SECONDS = 0.05


class StopSignals:
    """Stop requests of this process.

    SIGUSR1 asks for a stop: a checkpoint after the next step, then the end. So does SIGTERM; a second one ends the
    process at once. SIGINT (Ctrl-C) raises KeyboardInterrupt once; a second one ends the process at once. With several
    ranks supervise/failure.py takes SIGTERM and SIGINT over, because a failure of another rank may have caused them.
    SIGHUP is ignored: a terminal that closes is an output that fails, and ends no training.
    """

    def __init__(self) -> None:
        self.reason = ""
        """Name of the signal that asked for a stop; empty without a request."""
        self.failure = ""
        """Why training cannot go on, found by another thread; empty while it can. The next step raises it."""
        self.sigterm_received = False
        self._first_sigterm = 0.0
        self._first_sigint = 0.0

    def listen(self) -> None:
        """Install the handlers; call it in the main thread."""
        signal.signal(signal.SIGUSR1, self._on_sigusr1)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # a process that was started to outlive its terminal keeps ignoring SIGTERM
        if signal.getsignal(signal.SIGTERM) != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, self._on_sigterm)
        # a shell without job control starts background processes that ignore SIGINT
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, self._on_sigint)
        os.register_at_fork(after_in_child=reset_handlers_in_child)

    def request_stop(self, reason: str) -> None:
        """Ask for a stop; the first request is the reason."""
        self.reason = self.reason or reason

    def is_repeated_sigterm(self) -> bool:
        """Register a SIGTERM that has just arrived; return whether it is more than a duplicate of the first one."""
        now = time.monotonic()
        if not self.sigterm_received:
            self.sigterm_received, self._first_sigterm = True, now
        return now - self._first_sigterm > DUPLICATE_SECONDS

    def wait(self, seconds: float) -> bool:
        """Wait until SIGTERM arrives, at most ``seconds``; return whether it arrived."""
        end = time.monotonic() + seconds
        while not self.sigterm_received and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return self.sigterm_received

    def _on_sigusr1(self, number: int, _frame: Any) -> None:
        self.request_stop(signal.Signals(number).name)

    def _on_sigterm(self, number: int, _frame: Any) -> None:
        if self.is_repeated_sigterm():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.request_stop(signal.Signals(number).name)

    def _on_sigint(self, number: int, _frame: Any) -> None:
        now = time.monotonic()
        if not self._first_sigint:
            self._first_sigint = now
            raise KeyboardInterrupt
        if now - self._first_sigint > DUPLICATE_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def reset_handlers_in_child() -> None:
    """In a forked child: let SIGTERM from the parent end it, ignore SIGUSR1 and SIGINT sent to the process group."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
