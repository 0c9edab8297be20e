"""Open a page to try a model on: a picture, questions, the answers of two models side by side, and their attention.

    make chat                                                  # the model of make demo
    python tools/demo_page.py runs/demo/sft                    # the same: its weights under mma and under causal
    python tools/demo_page.py runs/a --compare runs/b          # two trained models, each under its own attention rule
    python tools/demo_page.py aki-hf --dtype bf16 --no_browser # a folder of tools/convert.py to-hf; prints the address

The page begins with scenes like those of the demo's data; choose one, or any picture of your own, and ask. Answers are
streamed from /v1/chat/completions of the same server, which other clients may use too (tools/serve.py). Everything
stays on this machine: the server listens on 127.0.0.1 only. From another machine: ssh -L 8000:127.0.0.1:PORT HOST, then
open http://127.0.0.1:8000. Ctrl-C ends it. docs/chat_page.md says what it shows.
"""

import argparse
import logging
import os
import sys
import webbrowser
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from aki_megatron.argument_types import as_path, whole_number
from aki_megatron.errors import CheckpointError, ConfigError, UserError
from aki_megatron.evaluate.chat_page.example import Example, ExampleQuestion

if TYPE_CHECKING:  # it loads torch, for which --help and wrong arguments must not wait
    from aki_megatron.evaluate.chat_page.compared import Comparison

HOST = "127.0.0.1"
DEMO_RUN = Path("runs/demo/sft")
NUM_EXAMPLES = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Serve the page until a signal; return the exit code."""
    arguments = build_parser().parse_args(argv)
    try:
        return run(arguments)
    except UserError as error:
        print(f"demo_page: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo_page: interrupted", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Load the models and serve the page."""
    for path in filter(None, (arguments.model, arguments.compare)):
        if not path.exists():
            advice = "make demo trains it" if path == DEMO_RUN else "give a run folder, a checkpoint or a to-hf folder"
            raise CheckpointError(f"{path} does not exist; {advice}.")
    try:
        from aki_megatron.evaluate.serving.server import Server, bind, serve
    except ImportError as error:
        if error.name not in ("starlette", "uvicorn", "python_multipart"):
            raise
        raise ConfigError(f"The page needs {error.name}: pip install 'aki-megatron[serve]'.") from None
    from aki_megatron.evaluate.chat_page.page import page_endpoints
    from aki_megatron.evaluate.chat_page.wording import Wording, trained_wording
    from aki_megatron.evaluate.serving.app import build_app
    from aki_megatron.evaluate.serving.backend import Backend
    from aki_megatron.evaluate.serving.limits import Limits
    from aki_megatron.evaluate.serving.service import AnsweringService

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    listener = bind(HOST, arguments.port)  # before the models are loaded, which may take minutes
    comparison = load_models(arguments)
    limits = Limits()
    backends = {
        each.name: Backend(AnsweringService(each.model), limits, model_name=each.name) for each in comparison.models
    }
    first, *others = backends.values()
    wording = trained_wording(comparison.models[0].model.path)
    wording = Wording(
        wording.instruction if arguments.instruction is None else arguments.instruction,
        arguments.ask_with or wording.history,
    )
    endpoints = page_endpoints(backends, comparison, drawn_examples(), wording)
    app = build_app(first, others=others, endpoints=endpoints)
    address = f"http://{HOST}:{listener.getsockname()[1]}/"

    def give_up() -> None:
        for backend in backends.values():
            backend.service.stop(timeout=0)

    server = Server(
        app,
        limits,
        on_start=lambda: announce(address, with_browser=not arguments.no_browser),
        on_stop=give_up,
    )
    with ExitStack() as stack:
        for backend in backends.values():
            stack.callback(backend.close)
            backend.service.start()
            stack.callback(backend.service.stop, timeout=60)
        serve(server, listener)
    return 0


def load_models(arguments: argparse.Namespace) -> "Comparison":
    """Load one model for two attention rules, or two models."""
    from aki_megatron.evaluate.chat_page.compared import NamedModel, compare_rules, compare_runs
    from aki_megatron.evaluate.model_loading import DTYPES, default_device, load_saved_model

    device = arguments.device or default_device()
    dtype = DTYPES[arguments.dtype or ("bf16" if device.startswith("cuda") else "fp32")]
    models = [
        NamedModel(str(path), load_saved_model(path, tokenizer=arguments.tokenizer, device=device, dtype=dtype))
        for path in filter(None, (arguments.model, arguments.compare))
    ]
    return compare_runs(*models) if len(models) > 1 else compare_rules(*models)


def drawn_examples() -> list[Example]:
    """Draw scenes that the demo's model has not trained on, with questions that it has learnt to answer."""
    from aki_megatron.synthetic.dataset import DatasetSize
    from aki_megatron.synthetic.examples import draw_examples

    return [
        Example(
            example.image,
            f"A drawn scene: {example.caption}",
            tuple(ExampleQuestion(question.text, question.answer) for question in example.questions),
        )
        for example in draw_examples(NUM_EXAMPLES, DatasetSize().seed)
    ]


def announce(address: str, *, with_browser: bool) -> None:
    """Print where the page is, and open it where this machine has a screen."""
    print(f"The page is at {address}  (Ctrl-C ends it)", flush=True)
    has_screen = sys.platform == "darwin" or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))
    if with_browser and has_screen:  # browsers of a terminal would take this one
        webbrowser.open(address)


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=as_path, help="a run folder, a checkpoint, or a folder that tools/convert.py to-hf wrote")
    add("--compare", type=as_path, metavar="RUN", help="a second trained model; without it the first one runs under "
        "another attention rule beside itself")  # fmt: skip
    add("--ask_with", choices=("conversation", "again", "alone"), help="what a question is asked with first: the "
        "conversation before it, that and the picture again, the picture only (default: as in training)")  # fmt: skip
    add("--instruction", metavar="TEXT", help="put before every question at first, such as 'Answer the question "
        "using a single word or phrase.' (default: as in training)")  # fmt: skip
    add("--port", type=whole_number(0, 65535), default=0, help="port; 0: a free one (default %(default)s)")
    add("--no_browser", action="store_true", help="only print the address")
    add("--tokenizer", type=as_path, help="folder of the tokenizer, where a checkpoint has none")
    add("--device", help="cpu, cuda, cuda:1 ... (default: a GPU where there is one)")
    add("--dtype", choices=("bf16", "fp32"), help="precision of the weights (default: bf16 on a GPU, fp32 on a CPU)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
