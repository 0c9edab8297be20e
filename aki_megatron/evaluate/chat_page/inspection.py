"""/inspect: which words of its question the last picture of a conversation attends to, and where in the picture.

The request is that of /v1/chat/completions (model, messages; other parameters are ignored). The response:

    model, rule, layers  whose attention it is; decoder layers of which it is the mean
    turn, num_turns      question in which the picture stands, from 1, and questions there are
    is_last              whether the picture stands in the last question; no rule lets it see a later one
    words                of that question: text, start, end, num_tokens, mass, is_later (QuestionWord)
    grid                 height and width in patches
    heat                 for each word the mass of every patch, row by row from the top of the picture
    base                 where the picture's tokens look whatever the word, in the same order; its sum is 1
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from aki_megatron.evaluate.attention_analysis.question import QuestionAttention, inspect_question
from aki_megatron.evaluate.serving.backend import Backend
from aki_megatron.evaluate.serving.body import Parsed
from aki_megatron.evaluate.serving.completions import named_backend
from aki_megatron.evaluate.serving.errors import bad_request
from aki_megatron.evaluate.serving.web import Receive, Scope, Send, json_response
from aki_megatron.types import Conversation, Modality

DIGITS = 6
"""Significant digits of the numbers of a response."""


class Inspection:
    """The endpoint, an ASGI application. Raises ApiError and ClientGoneError."""

    def __init__(self, backends: Mapping[str, Backend]) -> None:
        """Inspect these models, by name; the first is taken where a request names none."""
        self._backends = backends

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = next(iter(self._backends.values()))
        async with first.admitted(scope, receive) as incoming:
            backend, conversation = await incoming.prepare(self._read)
            incoming.backend = backend
            template, image = backend.service.model.template, len(conversation.images) - 1
            found = await incoming.call_model(
                lambda stage: inspect_question(stage, template, conversation, image=image)
            )
            body = {"model": backend.model_name, **as_json(found, conversation)}
            await json_response(body)(scope, receive, send)

    def _read(self, parsed: Parsed) -> tuple[Backend, Conversation]:
        """Return the model of a request and its conversation, the media decoded; runs in a worker thread."""
        backend = named_backend(self._backends, parsed.request)
        conversation = backend.reader.read_conversation(parsed.request.get("messages"), parsed.files)
        if not conversation.images:
            raise bad_request("The conversation holds no picture; send one as a part image_url.", "messages")
        return backend, conversation


def as_json(found: QuestionAttention, conversation: Conversation) -> dict[str, Any]:
    """Return the attention of the last picture of a conversation as the response says it."""
    turn = max(
        number
        for number, one in enumerate(conversation.turns)
        if any(placeholder.modality == Modality.IMAGE for placeholder in one.placeholders)
    )
    height, width = found.base_grid.shape
    return {
        "rule": found.rule,
        "layers": list(found.layers),
        "turn": turn + 1,
        "num_turns": len(conversation.turns),
        "is_last": turn + 1 == len(conversation.turns),
        "words": [
            {
                "text": word.text,
                "start": word.start,
                "end": word.end,
                "num_tokens": word.num_tokens,
                "mass": _rounded(word.mass),
                "is_later": word.is_later,
            }
            for word in found.words
        ],
        "grid": {"height": height, "width": width},
        "heat": [_numbers(found.grid[:, :, number]) for number in range(len(found.words))],
        "base": _numbers(found.base_grid),
    }


def _numbers(grid: Tensor) -> list[float]:
    return [_rounded(value) for value in grid.flatten().tolist()]


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
