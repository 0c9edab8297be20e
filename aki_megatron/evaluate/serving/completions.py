"""/v1/chat/completions: one answer a request, whole or as a stream of events."""

import asyncio
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress

from aki_megatron.evaluate.answering import Request as AnswerRequest
from aki_megatron.evaluate.serving.backend import Answer, Backend, Incoming, named_backend
from aki_megatron.evaluate.serving.body import ClientGoneError, Parsed
from aki_megatron.evaluate.serving.errors import ApiError
from aki_megatron.evaluate.serving.parameters import Parameters, read_parameters
from aki_megatron.evaluate.serving.replies import END_OF_STREAM, Reply, event, usage
from aki_megatron.evaluate.serving.web import Receive, Scope, Send, json_response
from aki_megatron.types import Sample

EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

LAST_WORDS_SECONDS = 5.0
"""For the last event of a stream whose time is over."""


class ChatCompletions:
    """The endpoint, an ASGI application. Raises ApiError before the response begins, and ClientGoneError."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        """Answer with these models, by name; the first is taken where a request names none."""
        self._backends = backends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = next(iter(self._backends.values()))
        async with first.admitted(scope, receive) as incoming:
            backend, parameters, prompt = await incoming.prepare(self._read)
            incoming.backend = backend
            incoming.notes["prompt"] = len(prompt.token_ids)
            if prompt.media:
                incoming.notes["media"] = len(prompt.media)
            # what the prompt leaves; finish_reason tells where it ends an answer
            left = backend.reader.positions - len(prompt.token_ids)
            request = AnswerRequest(
                prompt,
                min(parameters.max_new_tokens, left),
                parameters.sampling,
                stop_texts=parameters.stop_texts,
            )
            reply = Reply(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), backend.model_name)
            with incoming.answering(request, stream=parameters.stream) as answer:
                if parameters.stream:
                    stream = _Stream(send, reply, incoming, include_usage=parameters.include_usage)
                    await stream.run(answer)
                else:
                    while await answer.next_piece() is not None:
                        pass
                    _note(incoming, request)
                    await json_response(reply.whole(request))(scope, receive, send)

    def _read(self, parsed: Parsed) -> tuple[Backend, Parameters, Sample]:
        """Return the model, the parameters and the prompt of a request; runs in a worker thread."""
        backend = named_backend(self._backends, parsed.request)
        parameters = read_parameters(parsed.request, backend.model_name, backend.limits)
        return backend, parameters, backend.reader.read(parsed.request.get("messages"), parsed.files)


def _note(incoming: Incoming, request: AnswerRequest) -> None:
    incoming.notes["new"] = usage(request)["completion_tokens"]
    incoming.notes["end"] = request.finish_reason


class _Stream:
    """The events of one answer. The response begins with the first piece, so that earlier errors have their status."""

    def __init__(self, send: Send, reply: Reply, incoming: Incoming, *, include_usage: bool) -> None:
        self._send_message, self._reply, self._incoming = send, reply, incoming
        self._include_usage = include_usage

    async def run(self, answer: Answer) -> None:
        """Send everything."""
        piece = await answer.next_piece()
        try:
            # a client that does not read blocks sending; next_piece raises at the deadline by itself
            async with asyncio.timeout_at(self._incoming.deadline + LAST_WORDS_SECONDS):
                await self._begin()
                while piece is not None:
                    await self._send(event(self._reply.chunk({"content": piece})))
                    piece = await answer.next_piece()
                request = answer.request
                _note(self._incoming, request)
                await self._send(event(self._reply.chunk({}, request.finish_reason)))
                if self._include_usage:
                    await self._send(event(self._reply.usage_chunk(request)))
                await self._end()
        except ApiError as error:
            await self._fail(error)
        except TimeoutError:
            self._incoming.notes["end"] = "client does not read"
        except ClientGoneError:
            self._incoming.notes["end"] = "client left"

    async def _begin(self) -> None:
        await self._send_message({"type": "http.response.start", "status": 200, "headers": EVENTS})
        await self._send(event(self._reply.chunk({"role": "assistant", "content": ""})))

    async def _send(self, data: bytes) -> None:
        await self._send_message({"type": "http.response.body", "body": data, "more_body": True})

    async def _end(self) -> None:
        await self._send_message({"type": "http.response.body", "body": END_OF_STREAM, "more_body": False})

    async def _fail(self, error: ApiError) -> None:
        """Tell an error in the stream: its status was sent long ago."""
        self._incoming.notes["end"] = error.code or "failed"
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await self._send(event(error.body()))
                await self._end()
