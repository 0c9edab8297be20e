"""Refusals of requests in OpenAI's shape."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aki_megatron.errors import UserError

MAX_MESSAGE = 1000
"""Characters of a message: it may quote the request."""

RETRY_SECONDS = 2
"""After which a request that was turned away may come again."""


@dataclass(eq=False)
class ApiError(UserError):
    """A request that is refused, or that failed.

    status      of HTTP
    message     what was got, what is allowed
    param       the parameter that it is about
    code        a word for programs
    kind        OpenAI's type of the error
    retry       whether the same request may succeed later
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    kind: str = "invalid_request_error"
    retry: bool = False

    def __post_init__(self) -> None:
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        text = str(self)
        text = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]} ..."
        return {"error": {"message": text, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the status."""
        headers = {"retry-after": str(RETRY_SECONDS)} if self.retry else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that is wrong in itself."""
    return ApiError(400, message, param, code)


def unknown_model(name: str, known: Iterable[str]) -> ApiError:
    """Return the error of a request for a model that the server does not have."""
    shown, listed = ascii(name[:80]), ", ".join(map(repr, known))
    return ApiError(404, f"The model {shown} does not exist; this server has {listed}.", "model", "model_not_found")


def overloaded(message: str) -> ApiError:
    """Return the error of a request that comes at a bad time."""
    return ApiError(503, message, code="overloaded", kind="server_error", retry=True)


def timed_out(seconds: float) -> ApiError:
    """Return the error of a request that took too long."""
    message = (
        f"The answer was not complete after {seconds:g} seconds (--request_seconds), the time in the queue included. "
        "Ask for fewer tokens, or come again when fewer requests run."
    )
    return ApiError(503, message, code="timeout", kind="server_error", retry=True)


def failed() -> ApiError:
    """Return the error of a request during which the server itself failed."""
    return ApiError(500, "The model failed while it answered; the server's log says why.", kind="server_error")
