"""Serve a model to OpenAI clients: /v1/chat/completions with images and streaming, /v1/models, /health.

    python tools/serve.py runs/demo/sft                        # a run (its newest checkpoint), at http://127.0.0.1:8000/v1
    python tools/serve.py runs/demo/sft/checkpoints/best       # one of its checkpoints
    python tools/serve.py aki-hf --dtype bf16 --port 0         # a folder of tools/convert.py to-hf; the port is printed
    AKI_SERVE_KEY=secret python tools/serve.py runs/sft --host 0.0.0.0      # for other machines: a key is needed

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"messages": [
      {"role": "user", "content": "What colour is the sky?"}], "max_tokens": 20}'
    curl http://127.0.0.1:8000/v1/chat/completions -F picture=@cat.jpg -F 'request={"messages": [{"role": "user",
      "content": [{"type": "image_url", "image_url": {"url": "attachment:picture"}}, "What is this?"]}]}'

Requests are answered together in one running batch. Nothing is fetched from the network. Decoding is greedy unless a
request says otherwise. Ctrl-C or SIGTERM ends the server. docs/serving.md: clients, evaluation kits, limits, security.
"""

import argparse
import logging
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from aki_megatron.argument_types import as_path, whole_number
from aki_megatron.console import IsolatedConsole
from aki_megatron.errors import ConfigError, UserError

KEY_VARIABLE = "AKI_SERVE_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal; return the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return run(arguments)
    except UserError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("serve: interrupted", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Load the model and serve it."""
    try:
        from aki_megatron.evaluate.serving.server import Server, bind, serve
    except ImportError as error:
        if error.name not in ("starlette", "uvicorn", "python_multipart"):
            raise
        raise ConfigError(f"Serving needs {error.name}: pip install 'aki-megatron[serve]'.") from None
    from aki_megatron.evaluate.loading import DTYPES, default_device, load_for_answering
    from aki_megatron.evaluate.serving.access import Access, is_loopback
    from aki_megatron.evaluate.serving.app import build_app
    from aki_megatron.evaluate.serving.backend import Backend
    from aki_megatron.evaluate.serving.limits import Limits
    from aki_megatron.evaluate.serving.service import AnsweringService

    key = os.environ.get(KEY_VARIABLE, "")
    is_local = is_loopback(arguments.host)
    if not (key or is_local or arguments.no_key):
        raise ConfigError(
            f"--host {arguments.host} lets other machines ask: set a key in the environment variable {KEY_VARIABLE}, "
            "or say --no_key where everybody who reaches this machine may ask."
        )
    limits = Limits(**{each.name: getattr(arguments, each.name) for each in fields(Limits) if each.name in arguments})
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # forms that are refused have their line already
    allow_many_connections()
    listener = bind(arguments.host, arguments.port)  # before the model is loaded, which may take minutes
    device = arguments.device or default_device()
    dtype = DTYPES[arguments.dtype or ("bf16" if device.startswith("cuda") else "fp32")]
    model = load_for_answering(arguments.model, tokenizer=arguments.tokenizer, device=device, dtype=dtype)
    service = AnsweringService(model, max_sequences=limits.batch, max_waiting=limits.queue)
    name = arguments.model_name or default_name(arguments.model)
    backend = Backend(service, limits, model_name=name, image_newline=arguments.image_newline)
    console = IsolatedConsole(sys.stderr)
    app = build_app(
        backend,
        Access(key, loopback_only=is_local),
        log=lambda line: console.print(line, soft_wrap=True),
    )
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    server = Server(
        app,
        limits,
        on_start=lambda: print(f"{name} ({model.path}, {device}) at {address}/v1", flush=True),
        on_stop=lambda: service.stop(timeout=0),
    )
    service.start()
    try:
        serve(server, listener)
    finally:
        service.stop(timeout=60)
        backend.close()
    return 0


def default_name(path: Path) -> str:
    """Return the name of a model that the user gives none: that of its run folder or folder."""
    parts = [part for part in path.resolve().parts if part not in ("/", "checkpoints", "best", "latest")]
    named = [part for part in parts if not part.startswith("step_")]
    return (named or ["model"])[-1]


def allow_many_connections() -> None:
    """Raise the soft limit of open files, often 1024, to the hard one: each connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logging.getLogger(__name__).info("the limit of open files stays: %s", error)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=as_path, help="a run folder, a checkpoint, or a folder that tools/convert.py to-hf wrote")
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine only)")
    add("--port", type=whole_number(0, 65535), default=8000, help="port; 0: a free one (default %(default)s)")
    add("--no_key", action="store_true", help="let other machines ask without a key")
    add("--model_name", help="name of the model in requests (default: that of its folder)")
    add("--tokenizer", type=as_path, help="folder of the tokenizer, where the checkpoint has none")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--dtype", choices=("bf16", "fp32"), help="precision of the weights (default: bf16 on a GPU, fp32 on a CPU)")
    add("--image_newline", action="store_true", help="put a line break after an image that text follows, as the eleven "
        "datasets of fine-tuning have it; without it nothing is added to the messages")  # fmt: skip
    limits = parser.add_argument_group("limits", "a request beyond one is refused by name; the server goes on")
    add_limits(limits)
    return parser


def add_limits(group: argparse._ArgumentGroup) -> None:
    """Flags of Limits; a flag that is not given leaves the default of the field."""
    whole = whole_number(1, 2**40)
    mebibytes = lambda text: whole_number(1, 2**20)(text) * 2**20  # noqa: E731
    seconds = lambda text: float(whole_number(1, 10**6)(text))  # noqa: E731
    leave = argparse.SUPPRESS
    for flag, name, kind, text in (
        ("--body_megabytes", "body_bytes", mebibytes, "largest request, images included (default 32)"),
        ("--buffer_megabytes", "buffered_bytes", mebibytes, "all requests that are being read together (default 512)"),
        ("--image_pixels", "image_pixels", whole, "largest width x height of an image (default 67108864)"),
        ("--images", "media", whole, "images of one request (default 16)"),
        ("--text_chars", "text_chars", whole, "characters of one request (default 1000000)"),
        ("--positions", "positions", whole, "prompt and answer, images included (default 8192, or the model's)"),
        ("--new_tokens", "new_tokens", whole, "longest answer, also where a request asks for more (default 2048)"),
        ("--default_new_tokens", "default_new_tokens", whole, "longest answer of other requests (default 512)"),
        ("--batch", "batch", whole, "requests that are answered at a time (default 16)"),
        ("--queue", "queue", whole_number(0, 10**6), "requests that wait; more get 503 (default 256)"),
        ("--request_seconds", "request_seconds", seconds, "for an answer, waiting included (default 600)"),
        ("--body_seconds", "body_seconds", seconds, "for a client to send a request (default 60)"),
    ):  # fmt: skip
        group.add_argument(flag, dest=name, type=kind, default=leave, metavar="N", help=text)


if __name__ == "__main__":
    sys.exit(main())
