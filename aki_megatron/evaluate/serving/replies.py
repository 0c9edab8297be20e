"""Answers in the shape of OpenAI's chat completions: whole, or as events of a stream."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from aki_megatron.evaluate.answering import Request

END_OF_STREAM = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Reply:
    """One answer.

    id       names it
    created  seconds since 1970
    model    name of the model
    """

    id: str
    created: int
    model: str

    def whole(self, request: Request) -> dict[str, Any]:
        """Return the body of an answer that is sent at once."""
        message = {"role": "assistant", "content": request.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": request.finish_reason}
        return self._body("chat.completion", [choice]) | {"usage": usage(request)}

    def chunk(self, delta: Mapping[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """Return an event of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice])

    def usage_chunk(self, request: Request) -> dict[str, Any]:
        """Return the event with the numbers of tokens, the last of a stream that was asked for it."""
        return self._body("chat.completion.chunk", []) | {"usage": usage(request)}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(request: Request) -> dict[str, int]:
    """Return the numbers of tokens; every position of an image counts as one."""
    prompt, answer = len(request.prompt.token_ids), len(request.tokens)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def to_json(body: Any) -> bytes:
    """Return a body as UTF-8. Half a surrogate pair, which a request may hold, is written as an escape."""
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        return json.dumps(body, separators=(",", ":")).encode()


def event(body: Any) -> bytes:
    """Return a body as a server-sent event."""
    return b"data: " + to_json(body) + b"\n\n"
