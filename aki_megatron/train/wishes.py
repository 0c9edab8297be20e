"""What is wanted of a run from outside: signals to any rank, files that a person makes in the run folder."""

import time

from aki_megatron.config.interrupts import Interrupts
from aki_megatron.flow import Wish
from aki_megatron.train.folder import RunFolder

LOOK_SECONDS = 1.0
"""The files are looked for at most this often: the folder may lie on a slow network file system."""


class Wishes:
    """What this rank wants done after the step that begins; asked at every step.

    looks  whether this is the rank that looks for the files
    """

    def __init__(self, folder: RunFolder, interrupts: Interrupts, *, looks: bool) -> None:
        self.folder = folder
        self.interrupts = interrupts
        self.looks = looks
        self._next_look = 0.0

    def __call__(self) -> Wish:
        """The wishes of this rank."""
        wish = Wish.STOP if self.interrupts.reason else Wish.NONE
        if self.looks and time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            wish |= Wish.SAVE if self.folder.save.exists() else Wish.NONE
            wish |= Wish.STOP if self.folder.stop.exists() else Wish.NONE
        return wish

    def why_stop(self) -> str:
        """What asked for the stop, as far as this rank knows."""
        if self.folder.stop.exists():
            return f"{self.folder.stop.name} exists"
        return self.interrupts.reason or "another rank was asked to stop"
