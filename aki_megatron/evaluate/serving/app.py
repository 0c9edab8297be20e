"""The application: all endpoints, behind the checks of access, with one line in the log for each request."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aki_megatron.evaluate.serving.access import LOCAL, Access
from aki_megatron.evaluate.serving.backend import NOTES, Backend
from aki_megatron.evaluate.serving.body import ClientGoneError
from aki_megatron.evaluate.serving.completions import ChatCompletions
from aki_megatron.evaluate.serving.errors import ApiError, unknown_model
from aki_megatron.evaluate.serving.web import (
    ASGIApp,
    Headers,
    HTTPException,
    Message,
    Receive,
    Request,
    Response,
    Route,
    Scope,
    Send,
    Starlette,
    error_response,
    json_response,
)

CLIENT_GONE = 499
"""Status in the log of a request whose client left; nginx's."""

LogLine = Callable[[str], None]


@dataclass(frozen=True)
class Endpoint:
    """One path of the server.

    handler    an async function of a starlette request that returns a response, or an ASGI application; both may raise
               ApiError and ClientGoneError
    needs_key  whether it needs the server's key, if there is one
    """

    path: str
    handler: Any
    methods: tuple[str, ...] = ("GET",)
    needs_key: bool = True


def build_app(
    backend: Backend,
    access: Access = LOCAL,
    *,
    others: Sequence[Backend] = (),
    endpoints: Sequence[Endpoint] = (),
    log: LogLine = lambda line: None,
) -> ASGIApp:
    """Return the application.

    others     further models, which a request names; one that names none gets ``backend``
    endpoints  further ones; where none of them is /, that path lists all of them
    log        gets one line for each request
    """
    backends = {each.model_name: each for each in (backend, *others)}
    assert len(backends) == 1 + len(others), [each.model_name for each in (backend, *others)]
    models = _Models(backends)
    every = (
        Endpoint("/v1/chat/completions", ChatCompletions(backends), ("POST",)),
        Endpoint("/v1/models", models.list),
        Endpoint("/v1/models/{name:path}", models.one),
        Endpoint("/health", _health(backend, others), needs_key=False),
        *endpoints,
    )
    if all(each.path != "/" for each in every):
        every = (*every, Endpoint("/", _about(every), needs_key=False))

    app = Starlette(
        routes=[Route(each.path, each.handler, methods=list(each.methods)) for each in every],
        exception_handlers={
            ApiError: _on_api_error,
            HTTPException: _on_http_exception,
            ClientGoneError: _on_client_gone,
            Exception: _on_exception,
        },
    )
    return _Guard(app, access, frozenset(each.path for each in every if not each.needs_key), log)


class _Models:
    """What can be asked."""

    def __init__(self, names: Iterable[str]) -> None:
        created = int(time.time())
        self._models = {
            name: {"id": name, "object": "model", "created": created, "owned_by": "aki-megatron"} for name in names
        }

    async def list(self, _: Request) -> Response:
        return json_response({"object": "list", "data": list(self._models.values())})

    async def one(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._models:
            raise unknown_model(name, self._models)
        return json_response(self._models[name])


def _about(endpoints: Sequence[Endpoint]) -> Callable[[Request], Any]:
    """Return the endpoint for whoever opens the address in a browser: what is here, and which tool has a page."""
    body = {
        "about": "An OpenAI-compatible API. For a page to ask the model on: python tools/demo_page.py MODEL",
        "endpoints": [f"{method} {each.path.replace(':path', '')}" for each in endpoints for method in each.methods],
    }

    async def about(_: Request) -> Response:
        return json_response(body)

    return about


def _health(backend: Backend, others: Sequence[Backend]) -> Callable[[Request], Any]:
    """Return the endpoint: numbers of the first model; ok as long as all of them answer."""

    async def health(_: Request) -> Response:
        load = backend.service.load
        is_alive = all(each.service.is_alive for each in (backend, *others))
        body = {
            "status": "ok" if is_alive else "stopped",
            "model": backend.model_name,
            "running": load.running,
            "waiting": load.waiting,
            "queue": backend.limits.queue,
            "answered": load.answered,
        }
        return json_response(body, 200 if is_alive else 503)

    return health


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    request.scope.setdefault(NOTES, {}).setdefault("error", str(error))
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    texts = {404: "There is no such path here.", 405: "This path does not take this method."}
    code = {404: "unknown_url", 405: "method_not_allowed"}.get(error.status_code)
    response = error_response(ApiError(error.status_code, texts.get(error.status_code, error.detail), code=code))
    response.headers.update(error.headers or {})
    return response


async def _on_client_gone(request: Request, error: Exception) -> Response:
    request.scope.setdefault(NOTES, {})["end"] = "client left"
    return Response(status_code=CLIENT_GONE)  # nobody reads it


async def _on_exception(request: Request, error: Exception) -> Response:
    return error_response(ApiError(500, "The server failed; its log says why.", kind="server_error"))


@dataclass
class _Exchange:
    """What is known of a request when it is logged."""

    started: float = field(default_factory=time.monotonic)
    status: int = CLIENT_GONE


class _Guard:
    """Checks who asks, and writes the log; everything else passes to ``app``."""

    def __init__(self, app: ASGIApp, access: Access, open_paths: frozenset[str], log: LogLine) -> None:
        self._app, self._access, self._open_paths, self._log = app, access, open_paths, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange()
        scope[NOTES] = {}

        async def noting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
            await send(message)

        try:
            self._access.check(Headers(scope=scope), needs_key=scope["path"] not in self._open_paths)
        except ApiError as error:
            scope[NOTES]["error"] = str(error)
            await error_response(error)(scope, receive, noting_send)
            self._write(scope, exchange)
            return
        try:
            await self._app(scope, receive, noting_send)
        except ClientGoneError:  # after the response had begun
            scope[NOTES]["end"] = "client left"
        finally:
            self._write(scope, exchange)

    def _write(self, scope: Scope, exchange: _Exchange) -> None:
        client = (scope.get("client") or ("?", 0))[0]
        # a path may hold anything, line breaks and colours of a terminal included
        path = ascii(scope["path"][:200])[1:-1]
        seconds = time.monotonic() - exchange.started
        notes = " ".join(f"{name}={_plain(value)}" for name, value in scope[NOTES].items())
        self._log(
            f"{time.strftime('%H:%M:%S')} {client} {scope['method'][:10]} {path} {exchange.status} "
            f"{seconds:.2f} s {notes}".rstrip()
        )


def _plain(value: Any) -> str:
    text = str(value)
    return text if text.isascii() and text.isalnum() else ascii(text[:300])
