"""The page's files, and what it asks for first: which models there are, what they take, pictures to begin with."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from aki_megatron.evaluate.chat_page.compared import Comparison
from aki_megatron.evaluate.chat_page.example import Example
from aki_megatron.evaluate.chat_page.inspection import Inspection
from aki_megatron.evaluate.chat_page.wording import DEFAULT_WORDING, Wording
from aki_megatron.evaluate.serving.app import Endpoint
from aki_megatron.evaluate.serving.backend import Backend
from aki_megatron.evaluate.serving.limits import Limits
from aki_megatron.evaluate.serving.web import Request, Response, json_response

STATIC = Path(__file__).parent / "static"

MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
"""Suffix of a file of STATIC -> what it is; others are not served."""

HEADERS = {
    # nothing but this server, and no other page around this one
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}

MESSAGE_BYTES = 2**16
"""Of a request's largest body, what is left for everything but the picture."""


def page_endpoints(
    backends: Mapping[str, Backend],
    comparison: Comparison,
    examples: Sequence[Example] = (),
    wording: Wording = DEFAULT_WORDING,
) -> list[Endpoint]:
    """Return the endpoints of the page: /, its files below /page/, /page/setup and /inspect.

    backends  of the models of ``comparison``, by name
    wording   how questions are put until the user chooses otherwise
    """
    first = comparison.models[0].model
    body = {
        "about": comparison.about,
        "models": [
            {"id": each.name, "rule": each.rule, "sees_question": each.sees_question} for each in comparison.models
        ],
        "limits": _limits(backends[comparison.models[0].name].limits),
        "wording": asdict(wording),
        "images": {"exif_rotation": first.image_options.exif_rotation},
        "examples": [_example(example) for example in examples],
    }

    async def setup(_: Request) -> Response:
        return json_response(body, headers={"cache-control": "no-cache"})

    files = [path for path in sorted(STATIC.iterdir()) if path.suffix in MEDIA_TYPES]
    return [
        *(
            Endpoint("/" if path.name == "index.html" else f"/page/{path.name}", partial(_file, path), needs_key=False)
            for path in files
        ),
        Endpoint("/page/setup", setup, needs_key=False),
        Endpoint("/inspect", Inspection(backends), ("POST",)),
    ]


async def _file(path: Path, _: Request) -> Response:
    return Response(path.read_bytes(), headers=HEADERS, media_type=f"{MEDIA_TYPES[path.suffix]}; charset=utf-8")


def _limits(limits: Limits) -> dict[str, int]:
    """Return what the page checks before it sends a picture, which is a third larger in base64."""
    return {
        "image_bytes": max(0, limits.body_bytes - MESSAGE_BYTES) * 3 // 4,
        "image_pixels": limits.image_pixels,
    }


def _example(example: Example) -> dict[str, Any]:
    url = f"data:{example.media_type};base64,{base64.b64encode(example.image).decode()}"
    questions = [asdict(question) for question in example.questions]
    return {"url": url, "description": example.description, "questions": questions}
