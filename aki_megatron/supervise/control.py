"""Requests to a run from outside: signals to any rank, and files that the user creates in the run folder."""

import time

from aki_megatron.errors import DataError
from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.types import ControlRequest

POLL_SECONDS = 1.0
"""Shortest time between two checks for the files: the run folder may be on a slow network file system."""


class ControlSignals:
    """Requests that this rank knows of.

    checks_files  whether this rank checks for the files SAVE and STOP; one rank does
    """

    def __init__(self, paths: RunPaths, stop_signals: StopSignals, *, checks_files: bool) -> None:
        self.paths = paths
        self.stop_signals = stop_signals
        self.checks_files = checks_files
        self._next_poll = 0.0

    def poll(self) -> ControlRequest:
        """Return what this rank wants done after the step that begins; called at every step.

        Raises DataError where another thread has found that training cannot go on.
        """
        if self.stop_signals.failure:
            raise DataError(self.stop_signals.failure)
        request = ControlRequest.STOP if self.stop_signals.reason else ControlRequest.NONE
        if self.checks_files and time.monotonic() >= self._next_poll:
            self._next_poll = time.monotonic() + POLL_SECONDS
            request |= ControlRequest.SAVE if self.paths.save.exists() else ControlRequest.NONE
            request |= ControlRequest.STOP if self.paths.stop.exists() else ControlRequest.NONE
        return request

    def stop_reason(self) -> str:
        """Return what asked for the stop, as far as this rank knows."""
        if self.paths.stop.exists():
            return f"{self.paths.stop.name} exists"
        return self.stop_signals.reason or "another rank was asked to stop"
