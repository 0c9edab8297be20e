"""The only way to starlette: other modules import its names from here (tests/test_architecture.py)."""

from collections.abc import Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aki_megatron.evaluate.serving.errors import ApiError
from aki_megatron.evaluate.serving.replies import to_json

__all__ = [
    "ASGIApp",
    "HTMLResponse",
    "HTTPException",
    "Headers",
    "Message",
    "Receive",
    "Request",
    "Response",
    "Route",
    "Scope",
    "Send",
    "Starlette",
    "error_response",
    "json_response",
]


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a response with a body in JSON."""
    return Response(to_json(body), status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    """Return the response of a request that is refused, or that failed."""
    return json_response(error.body(), error.status, error.headers())
