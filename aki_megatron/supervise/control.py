"""What is wanted of a run from outside: signals to any rank, files that a person makes in the run folder."""

import time

from aki_megatron.supervise.run_paths import RunPaths
from aki_megatron.supervise.signals import StopSignals
from aki_megatron.types import ControlRequest

LOOK_SECONDS = 1.0
"""The files are looked for at most this often: the folder may lie on a slow network file system."""


class ControlSignals:
    """What this rank wants done after the step that begins; asked at every step.

    looks  whether this is the rank that looks for the files
    """

    def __init__(self, folder: RunPaths, stop_signals: StopSignals, *, looks: bool) -> None:
        self.folder = folder
        self.stop_signals = stop_signals
        self.looks = looks
        self._next_look = 0.0

    def __call__(self) -> ControlRequest:
        """The control_signals of this rank."""
        wish = ControlRequest.STOP if self.stop_signals.reason else ControlRequest.NONE
        if self.looks and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            wish |= ControlRequest.SAVE if self.folder.save.exists() else ControlRequest.NONE
            wish |= ControlRequest.STOP if self.folder.stop.exists() else ControlRequest.NONE
        return wish

    def why_stop(self) -> str:
        """What asked for the stop, as far as this rank knows."""
        if self.folder.stop.exists():
            return f"{self.folder.stop.name} exists"
        return self.stop_signals.reason or "another rank was asked to stop"
