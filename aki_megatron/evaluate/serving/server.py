"""Listen and serve until a signal: the only way to uvicorn."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from aki_megatron.errors import ConfigError
from aki_megatron.evaluate.serving.limits import Limits
from aki_megatron.evaluate.serving.web import ASGIApp

GRACE_SECONDS = 5
"""For answers that are being written when the server is told to stop."""

BACKLOG = 2048
"""Connections that the system may hold before they are accepted."""


def bind(host: str, port: int) -> socket.socket:
    """Return a socket of an address, which ``serve`` listens on; port 0 takes a free one.

    Raises ConfigError where that fails, as it does where another program listens there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} is no address of this machine ({error}).") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _cannot_listen(f"{host} port {port}", error) from None
    return listener


def serve(server: "Server", listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError where another program has begun to listen there."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise _cannot_listen(f"{listener.getsockname()}", error) from None
    asyncio.run(server.serve(sockets=[listener]))


def _cannot_listen(where: str, error: OSError) -> ConfigError:
    return ConfigError(f"Cannot listen on {where} ({error.strerror or error}); give another --port, or --port 0.")


class Server(uvicorn.Server):
    """A server that ends by itself after a signal; uvicorn's would raise the signal once more."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        *,
        on_start: Callable[[], None] = lambda: None,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """Serve an application.

        on_start  is called when the first request can come
        on_stop   is called GRACE_SECONDS after a signal if answers still run then, to give them up
        """

        def protocol(*arguments: Any, **settings: Any) -> asyncio.Protocol:
            return _TimedProtocol(limits, *arguments, **settings)

        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=limits.header_seconds,  # type: ignore[arg-type]
                timeout_graceful_shutdown=2 * GRACE_SECONDS,
                backlog=BACKLOG,
            )
        )
        self._on_start, self._on_stop = on_start, on_stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._on_stop)
        await super().shutdown(sockets=sockets)
        timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        try:
            before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread, which alone gets signals
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # the second one does not wait
        self.should_exit = True


class _TimedProtocol(H11Protocol):
    """A connection that is closed where the headers of a request take too long, and where the client does not read.

    uvicorn has a limit for the time between two requests only.
    """

    def __init__(self, limits: Limits, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._limits = limits
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()
        connection = transport.get_extra_info("socket")
        if connection is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            with contextlib.suppress(OSError):
                milliseconds = int(1000 * self._limits.request_seconds)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._start_timer()  # parts of the next headers, or of a body that nobody reads
        else:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _start_timer(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(self._limits.header_seconds, self._close)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _close(self) -> None:
        self._header_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()
