"""What the endpoints of one server share: the model's service, limits, and the way from an HTTP request to a prompt.

Parsing bodies, decoding images and tokenizing happen in a few worker threads, generation on the model's own; the event
loop only waits.
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

from aki_megatron.errors import UserError
from aki_megatron.evaluate.answering import Request as AnswerRequest
from aki_megatron.evaluate.serving.body import ClientGoneError, Hold, Parsed, Slots, parse_body, read_body
from aki_megatron.evaluate.serving.conversations import PromptReader
from aki_megatron.evaluate.serving.errors import ApiError, bad_request, failed, overloaded, timed_out, unknown_model
from aki_megatron.evaluate.serving.limits import Limits
from aki_megatron.evaluate.serving.service import AnsweringService, QueueFullError, StoppedError
from aki_megatron.evaluate.serving.web import Headers, Receive, Scope
from aki_megatron.model.stage import Stage

Result = TypeVar("Result")

MAX_WORKERS = 4
"""Threads that decode images; each may hold an image of Limits.image_pixels."""

NOTES = "aki_megatron.notes"
"""Key of a request's scope: a dict of what the log says of it beside status and time."""


class Backend:
    """One model behind HTTP.

    reader  makes prompts of messages
    """

    def __init__(
        self, service: AnsweringService, limits: Limits, *, model_name: str, image_newline: bool = False
    ) -> None:
        """Serve the model of ``service`` under a name.

        image_newline  as in PromptReader
        """
        self.service, self.limits, self.model_name = service, limits, model_name
        self.reader = PromptReader(service.model, limits, image_newline)
        self.slots = Slots(limits)
        workers = max(1, min(MAX_WORKERS, os.cpu_count() or 1))
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prepare")

    def close(self) -> None:
        """End the worker threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def admitted(self, scope: Scope, receive: Receive) -> AsyncIterator["Incoming"]:
        """Read the body of a request and hold a place for it until the block ends.

        Raises ApiError where there is no place or the body is refused; ClientGoneError as read_body does.
        """
        hold = self.slots.take()
        try:
            headers = Headers(scope=scope)
            body = await read_body(headers, receive, self.limits, hold)
            incoming = Incoming(self, hold, headers.get("content-type", ""), body, scope.setdefault(NOTES, {}))
            del body
            async with incoming.watching(receive):
                yield incoming
        finally:
            hold.release()

    def submit_to_pool(self, function: Callable[[], Result], hold: Hold) -> "asyncio.Future[Result]":
        """Run a function in a worker thread; the place of its request is held until it has ended."""
        loop = asyncio.get_running_loop()
        try:
            future = self._pool.submit(function)
        except RuntimeError:  # closed meanwhile
            raise overloaded("The server is stopping.") from None
        hold.retain()

        def release(_: Any) -> None:
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(hold.release)

        future.add_done_callback(release)
        return asyncio.wrap_future(future)


def named_backend(backends: Mapping[str, Backend], body: Mapping[str, Any]) -> Backend:
    """Return the model that a request names, the first where it names none. Raises ApiError for any other name."""
    name = body.get("model")
    if name is None:
        return next(iter(backends.values()))
    if not isinstance(name, str):
        raise bad_request(f"model must be text, got {ascii(name)[:80]}.", "model")
    if name not in backends:
        raise unknown_model(name, backends)
    return backends[name]


class Incoming:
    """A request that was read: its body, not parsed yet, and whether the client still waits.

    backend   of the model that answers; the first of the server until the request says which
    deadline  loop time at which the answer must be complete
    notes     what the log says of it
    """

    def __init__(self, backend: Backend, hold: Hold, content_type: str, body: bytes, notes: dict[str, Any]) -> None:
        self.backend, self.notes = backend, notes
        self.deadline = asyncio.get_running_loop().time() + backend.limits.request_seconds
        self._hold, self._content_type, self._body = hold, content_type, body
        self._is_gone = threading.Event()
        self._gone = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def watching(self, receive: Receive) -> AsyncIterator[None]:
        """Notice when the client closes the connection."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._is_gone.set()
            if not self._gone.done():
                self._gone.set_result(None)

        task = asyncio.get_running_loop().create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            self._gone.cancel()

    async def prepare(self, function: Callable[[Parsed], Result]) -> Result:
        """Parse the body and return what ``function`` makes of it, in a worker thread.

        Raises ApiError as ``function`` does; ClientGoneError where nobody waits any more.
        """
        body, content_type, is_gone = self._body, self._content_type, self._is_gone
        self._body = b""

        def run() -> Result:
            if is_gone.is_set():
                raise ClientGoneError
            try:
                return function(parse_body(content_type, body))
            except RecursionError:
                raise bad_request("The request is nested too deeply.") from None
            except MemoryError:
                raise overloaded("The request does not fit into memory now.") from None

        prepared = await self.wait(self.backend.submit_to_pool(run, self._hold))
        self._hold.free_bytes()
        return prepared

    async def wait(self, future: "asyncio.Future[Result]") -> Result:
        """Return the result of a future. Raises ApiError at the deadline, ClientGoneError when the client leaves."""
        timeout = max(0.0, self.deadline - asyncio.get_running_loop().time())
        await asyncio.wait({future, self._gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if future.done():
            return future.result()
        future.cancel()
        if self._gone.done():
            raise ClientGoneError
        raise timed_out(self.backend.limits.request_seconds)

    async def call_model(self, function: Callable[[Stage], Result]) -> Result:
        """Return what a function of the model returns; it runs on the model's thread, between two tokens of others.

        Raises ApiError where the service is full, has stopped, or the function fails.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def finish(result: Result, error: Exception | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(as_api_error(error))

        def on_done(result: Any, error: Exception | None) -> None:
            loop.call_soon_threadsafe(finish, result, error)

        with service_errors():
            self.backend.service.call(function, on_done)
        return await self.wait(future)

    @contextmanager
    def answering(self, request: AnswerRequest, *, stream: bool) -> Iterator["Answer"]:
        """Queue a request for the model; it is cancelled where the block ends before it.

        stream  whether Answer.next_piece returns pieces before the end

        Raises ApiError (503) where too many wait.
        """
        answer = Answer(self, request, stream=stream)
        try:
            with service_errors():
                self.backend.service.submit(request, answer.on_done)
            yield answer
        finally:
            request.is_cancelled = True


class Answer:
    """An answer as it comes."""

    def __init__(self, incoming: Incoming, request: AnswerRequest, *, stream: bool) -> None:
        self.request = request
        self._incoming = incoming
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str | None, Exception | None]] = asyncio.Queue()
        if stream:
            request.on_text = lambda piece: self._put(piece, None)

    def on_done(self, _: AnswerRequest, error: Exception | None) -> None:
        """Take the end of the request, on the model's thread."""
        self._put(None, error)

    def _put(self, piece: str | None, error: Exception | None) -> None:
        with suppress(RuntimeError):  # the loop has ended: the server was stopped
            self._loop.call_soon_threadsafe(self._events.put_nowait, (piece, error))

    async def next_piece(self) -> str | None:
        """Return the next piece of the text; None where the answer is complete.

        Raises ApiError where it failed or took too long, ClientGoneError when the client leaves.
        """
        piece, error = await self._incoming.wait(asyncio.ensure_future(self._events.get()))
        if error is not None:
            raise as_api_error(error)
        return piece


@contextmanager
def service_errors() -> Iterator[None]:
    """Turn what a service refuses into ApiError."""
    try:
        yield
    except (QueueFullError, StoppedError) as error:
        raise as_api_error(error) from None


def as_api_error(error: Exception) -> ApiError:
    """Return the error that a client gets for what happened on the model's thread."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return bad_request(str(error))
    if isinstance(error, QueueFullError):
        return overloaded("As many requests wait as may (--queue); come again.")
    return overloaded("The server is stopping.") if isinstance(error, StoppedError) else failed()
