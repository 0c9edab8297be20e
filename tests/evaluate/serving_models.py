"""A tiny random model behind HTTP: its service, its application, a real server on a thread, requests."""

import base64
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from chat_folders import chat_folder
from PIL import Image

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.data.image import ImageOptions
from aki_megatron.data.media import num_media_tokens
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer, grow_tokenizer
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.model_loading import LoadedModel
from aki_megatron.evaluate.runner import collate_prompts
from aki_megatron.evaluate.serving.access import LOCAL, Access
from aki_megatron.evaluate.serving.app import build_app
from aki_megatron.evaluate.serving.backend import Backend
from aki_megatron.evaluate.serving.limits import Limits
from aki_megatron.evaluate.serving.server import Server, bind
from aki_megatron.evaluate.serving.service import AnsweringService
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import build_model

NAME = "tiny"

SYSTEM_MESSAGE = "Answer in one word."

LATENTS = 4

LIMITS = Limits(
    body_bytes=400_000,
    buffered_bytes=4_000_000,
    image_pixels=90_000,
    media=4,
    text_chars=4000,
    positions=400,
    new_tokens=24,
    default_new_tokens=12,
    batch=4,
    queue=12,
    body_seconds=300,
    request_seconds=300,
)
"""Small enough to be met by small requests."""


def tiny_config(vocab_size: int, num_added_tokens: int, positions: int = 512) -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            image_size=12, patch_size=4, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24
        ),
        resampler=ResamplerConfig(num_latents=LATENTS, num_layers=1, num_heads=2, head_dim=8),
        decoder=DecoderConfig(
            family="qwen2",
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=48,
            padded_vocab_size=vocab_size + num_added_tokens + 5,
            vocab_size=vocab_size,
            num_added_tokens=num_added_tokens,
            rope=RopeConfig(max_position_embeddings=positions),
        ),
    )


def tokenizer_folder(folder: Path) -> Path:
    """A small tokenizer of Qwen2.5's kind, with AKI's tokens."""
    grow_tokenizer(chat_folder(folder / "published", "qwen2"), folder / "grown")
    return folder / "grown"


def tiny_model(folder: Path) -> LoadedModel:
    """A random model with a tokenizer in ``folder``."""
    tokenizer = Tokenizer(tokenizer_folder(folder), FAMILIES["qwen2"].chat)
    config = tiny_config(tokenizer.image_id, tokenizer.num_tokens - tokenizer.image_id)
    stage = build_model(config, attention=AttentionConfig(rule="mma"))
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in stage.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    template = Template(tokenizer, num_media_tokens(config), 512, SYSTEM_MESSAGE)
    return LoadedModel(folder, stage.requires_grad_(False).eval(), template, ImageOptions())


@contextmanager
def backend(model: LoadedModel, limits: Limits = LIMITS, **settings: Any) -> Iterator[Backend]:
    """A backend whose service runs."""
    service = AnsweringService(model, max_sequences=limits.batch, max_waiting=limits.queue)
    built = Backend(service, limits, model_name=NAME, **settings)
    service.start()
    try:
        yield built
    finally:
        service.stop(timeout=300)
        built.close()


@contextmanager
def blocked(service: AnsweringService) -> Iterator[None]:
    """The model's thread does nothing until the block ends."""
    is_free, is_blocked = threading.Event(), threading.Event()

    def wait(_: object) -> None:
        is_blocked.set()
        is_free.wait(300)

    service.call(wait, lambda result, error: None)
    assert is_blocked.wait(300)
    try:
        yield
    finally:
        is_free.set()


def wait_until(condition: Callable[[], bool]) -> None:
    """Return when a condition holds; fail after five minutes."""
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@contextmanager
def running_server(
    served: Backend, access: Access = LOCAL, log: list[str] | None = None, **settings: Any
) -> Iterator[str]:
    """A server on a thread; yields its address."""
    app = build_app(served, access, log=(lambda line: None) if log is None else log.append, **settings)
    listener = bind("127.0.0.1", 0)
    host, port = listener.getsockname()
    started = threading.Event()
    server = Server(app, served.limits, on_start=started.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert started.wait(300)
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join(300)
        assert not thread.is_alive()


def greedy(served: Backend, messages: Any, new_tokens: int, files: Mapping[str, bytes] | None = None) -> list[int]:
    """The tokens that generate gives for the messages, by themselves."""
    prompt = served.reader.read(messages, files or {})
    model = served.service.model
    batch = collate_prompts([prompt], model.template, model.stage.config.vision.image_size)
    return generate(model.stage, batch, stop_ids=model.template.tokenizer.stop_ids, max_new_tokens=new_tokens)[0]


def png(color: str = "red", size: tuple[int, int] = (9, 7), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


def data_url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header says that it has this size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def image_part(content: bytes = png()) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(content), "detail": "low"}}


def ask(*parts: Any, **parameters: Any) -> dict[str, Any]:
    """A request of one question: texts, and parts."""
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **parameters}


def http(method: str, url: str, **options: Any) -> httpx.Response:
    """Send a request, past any proxy, without reading the certificates that nobody needs here."""
    return httpx.request(method, url, **{"timeout": 300, "verify": False, "trust_env": False, **options})


def post(address: str, body: Any, **options: Any) -> httpx.Response:
    """Send a request, a body in JSON or as it is."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **options.pop("headers", {})}
    return http("POST", f"{address}/v1/chat/completions", content=content, headers=headers, **options)


def answer(address: str, body: Any, **options: Any) -> str:
    """The text of the answer to a request that must succeed."""
    response = post(address, body, **options)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end as it should."""
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def send_raw(address: str, pieces: Sequence[bytes]) -> socket.socket:
    """Open a connection and send bytes; the caller reads or closes it."""
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=300)
    for piece in pieces:
        connection.sendall(piece)
    return connection
