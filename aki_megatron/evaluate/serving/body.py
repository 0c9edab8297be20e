"""The body of a request: read within limits, then parsed as JSON or as a form."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from aki_megatron.evaluate.serving.errors import ApiError, bad_request, overloaded
from aki_megatron.evaluate.serving.form import REQUEST_FIELD, parse_form
from aki_megatron.evaluate.serving.limits import Limits
from aki_megatron.evaluate.serving.web import Headers, Receive

FORM = "multipart/form-data"


class ClientGoneError(Exception):
    """The client has closed the connection; nobody waits for an answer."""


class Slots:
    """How many requests, and how many bytes of bodies, the server holds at this moment."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.num_requests = self.num_bytes = 0

    def take(self) -> "Hold":
        """Return a place for a request. Raises ApiError (503) where there is none."""
        if self.num_requests >= self._limits.requests:
            raise overloaded(f"{self.num_requests} requests are being answered or wait (--queue); come again.")
        self.num_requests += 1
        return Hold(self)

    def add_bytes(self, count: int) -> None:
        """Count bytes of a body. Raises ApiError (503) where the bodies of all requests are too many."""
        if self.num_bytes + count > self._limits.buffered_bytes:
            raise overloaded("Too many large requests are being read; come again.")
        self.num_bytes += count


class Hold:
    """The place of one request. It is given back when every user of it has called ``release``."""

    def __init__(self, slots: Slots) -> None:
        self._slots, self._num_users, self.num_bytes = slots, 1, 0

    def retain(self) -> None:
        """Add a user."""
        self._num_users += 1

    def add_bytes(self, count: int) -> None:
        """Count bytes of the body. Raises ApiError as Slots.add_bytes does."""
        self._slots.add_bytes(count)
        self.num_bytes += count

    def free_bytes(self) -> None:
        """Give the bytes of the body back: it is no longer in memory."""
        self._slots.num_bytes -= self.num_bytes
        self.num_bytes = 0

    def release(self) -> None:
        """Remove a user; the last one gives everything back."""
        self._num_users -= 1
        if not self._num_users:
            self.free_bytes()
            self._slots.num_requests -= 1


class Parsed(NamedTuple):
    """A parsed body: the request, and the files of a form by field."""

    request: Mapping[str, Any]
    files: Mapping[str, bytes]


async def read_body(headers: Headers, receive: Receive, limits: Limits, hold: Hold) -> bytes:
    """Return the whole body.

    Raises ApiError: 413 where it is too large, 415 where it is neither JSON nor a form, 408 where it comes too slowly,
    503 where too much is being read; ClientGoneError where the connection ends before the body does.
    """
    kind = _kind(headers)
    if kind not in ("application/json", FORM):
        raise ApiError(
            415, f"Content-Type is {ascii(kind[:80]) if kind else 'missing'}; send application/json or {FORM}."
        )
    length = headers.get("content-length", "")
    if length.isdecimal() and len(length) < 20 and int(length) > limits.body_bytes:
        _refuse_size(limits)
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                piece = message.get("body", b"")
                size += len(piece)
                if size > limits.body_bytes:
                    _refuse_size(limits)
                hold.add_bytes(len(piece))
                pieces.append(piece)
                if not message.get("more_body", False):
                    return b"".join(pieces)
    except TimeoutError:
        raise ApiError(
            408, f"The body was not complete after {limits.body_seconds:g} seconds.", code="timeout"
        ) from None


def parse_body(content_type: str, body: bytes) -> Parsed:
    """Parse a body. Raises ApiError (400) for one that is not what its type says."""
    if content_type.partition(";")[0].strip().lower() != FORM:
        return Parsed(_parse_json(body), {})
    fields = parse_form(content_type, body)
    if REQUEST_FIELD not in fields:
        raise bad_request(f"The form has no field {REQUEST_FIELD!r} with the request as JSON.", REQUEST_FIELD)
    return Parsed(_parse_json(fields.pop(REQUEST_FIELD)), fields)


def _kind(headers: Headers) -> str:
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def _refuse_size(limits: Limits) -> NoReturn:
    raise ApiError(413, f"The body is larger than {limits.body_bytes} bytes (--body_megabytes).", code="too_large")


def _parse_json(body: bytes) -> Mapping[str, Any]:
    try:
        parsed = json.loads(body, parse_constant=_refuse_constant)
    except RecursionError:
        raise bad_request("The request is nested too deeply.") from None
    except ValueError as error:  # also bytes that are not UTF-8, and numbers of thousands of digits
        raise bad_request(f"The request is not valid JSON: {str(error)[:200]}.") from None
    if not isinstance(parsed, dict):
        raise bad_request(f"The request must be an object, got a {type(parsed).__name__}.")
    return parsed


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
