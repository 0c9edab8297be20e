"""Handle signals in a thread, while the main thread may be stuck in native code."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Collection
from typing import Any

from aki_megatron.supervise.signals import reset_handlers_in_child


class SignalListener:
    """Pass signals to a function, from ``begin`` to ``end``."""

    def __init__(
        self, numbers: Collection[int], on_wakeup: Callable[[bytes | None], None], *, poll_seconds: float
    ) -> None:
        """Create a listener.

        numbers       signals to take over, unless the process ignores them
        on_wakeup     called in the thread with the numbers of the signals that arrived, and with None whenever none
                      arrived for ``poll_seconds``
        """
        self._numbers = numbers
        self._on_wakeup = on_wakeup
        self._poll_seconds = poll_seconds
        self._handlers: dict[int, Any] = {}

    def begin(self) -> None:
        """Install the handlers and start the thread; call it in the main thread."""
        receiver, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in self._numbers:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, lambda *_: None)
        # a forked child would share the socket, and its own SIGTERM would end this process
        os.register_at_fork(after_in_child=self._reset_in_child)
        threading.Thread(target=self._run, args=(receiver,), name="signals", daemon=True).start()

    def end(self) -> None:
        """Restore the handlers and end the thread; call it in the main thread."""
        while self._handlers:
            signal.set_wakeup_fd(-1)
            number, handler = self._handlers.popitem()
            signal.signal(number, handler or signal.SIG_DFL)
        self._wakeup.close()

    def _reset_in_child(self) -> None:
        self.end()
        reset_handlers_in_child()

    def _run(self, receiver: socket.socket) -> None:
        receiver.settimeout(self._poll_seconds)
        with receiver:
            while (signals := _receive(receiver)) != b"":  # empty: ``end`` has closed the other side
                self._on_wakeup(signals)


def _receive(receiver: socket.socket) -> bytes | None:
    """Return the numbers of the signals that arrived; None when none arrived in time."""
    try:
        return receiver.recv(64)
    except TimeoutError:
        return None
