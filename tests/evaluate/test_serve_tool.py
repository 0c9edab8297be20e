"""Models from checkpoints, run folders and exported folders answer alike; tools/serve.py from start to end."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from chat_folders import chat_folder
from serving_models import ask, http, image_part, png, post, tiny_model, tokenizer_folder

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.conversion_report import STRICT
from aki_megatron.checkpoint.conversion_steps import ConversionSettings, ConvertedModel, write_weights
from aki_megatron.checkpoint.hf_export import export
from aki_megatron.checkpoint.tensors import LazyTensors, TensorSpec
from aki_megatron.config.data import ImagesConfig
from aki_megatron.data.image import ImageOptions
from aki_megatron.data.media import media_decoders
from aki_megatron.errors import CheckpointError, DataError
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.model_loading import LoadedModel, ModelFolder, load_model, load_saved_model
from aki_megatron.evaluate.runner import collate_prompts, read_prompt
from aki_megatron.model.stage import build_model
from aki_megatron.types import Conversation, Turn, image_items
from tools import serve

ROOT = Path(__file__).resolve().parents[2]

IMAGES = ImagesConfig(transparency="white", exif_rotation=True)
MESSAGE = "Be polite."


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Path]:
    """A model, and a folder with ``run`` and ``hf`` made of it."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model(folder)
    weights = {name: tensor for name, tensor in model.stage.state_dict().items()}
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    source = LazyTensors(specs, {name: (lambda tensor=tensor: tensor) for name, tensor in weights.items()})
    settings = ConversionSettings(dtype=None, seed=0, num_files=1, allowed=STRICT, check_logits=False)
    converted = ConvertedModel(model.stage.config, model.stage.attention)
    tokenizer = model.template.tokenizer.folder
    write_weights(folder / "run" / files.CHECKPOINTS, source, converted, settings, tokenizer, MESSAGE, IMAGES)
    export(
        source, model.stage.config, model.stage.attention, tokenizer, folder / "hf",
        system_message=MESSAGE, images=IMAGES,
    )  # fmt: skip
    return model, folder


def tokens(model: LoadedModel) -> list[list[int]]:
    decoders = media_decoders(model.stage.config, model.image_options)
    questions = [
        Conversation("a", (Turn("What is in the picture?", ""),), image_items(png("blue"))),
        Conversation("b", (Turn("How many cats are there?", ""),)),
    ]
    prompts = [read_prompt(question, model.template, decoders) for question in questions]
    batch = collate_prompts(prompts, model.template, model.stage.config.vision.image_size)
    return generate(model.stage, batch, stop_ids=(), max_new_tokens=8)


def test_every_kind_of_folder_gives_the_same_model(saved: tuple[LoadedModel, Path]) -> None:
    original, folder = saved
    checkpoint = folder / "run" / files.CHECKPOINTS / "step_000000"
    loaded = [load_saved_model(path) for path in (folder / "run", checkpoint.parent, checkpoint, folder / "hf")]
    assert [one.path for one in loaded] == [checkpoint, checkpoint, checkpoint, folder / "hf"]
    for one in loaded:
        assert one.image_options == ImageOptions("white", True) and one.template.system_message == MESSAGE
        assert one.stage.attention == original.stage.attention and not one.stage.training
        for name, tensor in original.stage.state_dict().items():
            assert torch.equal(one.stage.state_dict()[name], tensor), name
    assert tokens(loaded[0]) == tokens(loaded[1]) == tokens(loaded[3])
    half = load_saved_model(folder / "hf", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in half.stage.parameters()} == {torch.bfloat16}
    assert all(len(answer) == 8 for answer in tokens(half))


def test_tied_tables_stay_one(saved: tuple[LoadedModel, Path]) -> None:
    config = saved[0].stage.config
    config = config.model_copy(
        update={"decoder": config.decoder.model_copy(update={"tie_word_embeddings": True, "lm_head_bias": False})}
    )
    attention = saved[0].stage.attention
    built = build_model(config, attention=attention)
    weights = dict(built.named_parameters())
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()}
    source = LazyTensors(specs, {name: (lambda name=name: weights[name].detach()) for name in weights})
    tokenizer = saved[0].template.tokenizer.folder
    opened = ModelFolder(saved[1], "tied", "", source, config, attention, tokenizer, MESSAGE, IMAGES)
    stage = load_model(opened, device=torch.device("cpu"), dtype=torch.float32).stage
    assert stage.lm_head is not None and stage.input_embedder is not None
    assert stage.lm_head.base.weight is stage.input_embedder.token_embedding.base.weight
    assert dict(stage.named_parameters()).keys() == weights.keys()


def test_what_is_no_model_is_refused(saved: tuple[LoadedModel, Path], tmp_path: Path) -> None:
    _, folder = saved
    with pytest.raises(CheckpointError, match="does not exist; give a run folder, a checkpoint, or a folder"):
        load_saved_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="No complete checkpoint"):
        load_saved_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not aki; give a folder that to-hf wrote"):
        load_saved_model(tmp_path)
    other = tokenizer_folder(tmp_path / "phi")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"<tool_call>"', '"<tool>"'))
    assert load_saved_model(folder / "run", tokenizer=other).template.tokenizer.folder == other
    with pytest.raises(DataError, match="lacks the special tokens"):
        load_saved_model(folder / "run", tokenizer=chat_folder(tmp_path / "llama", "llama"))


@contextmanager
def served(arguments: Sequence[str], **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The tool as a process, and its address."""
    command = [sys.executable, str(ROOT / "tools/serve.py"), *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"at (http://127\.0\.0\.1:\d+)/v1$", line.strip())
        assert found, (line, process.communicate()[1])
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


def test_the_tool_serves_until_a_signal(saved: tuple[LoadedModel, Path]) -> None:
    _, folder = saved
    arguments = [str(folder / "run"), "--port", "0", "--positions", "300"]
    with served(arguments, AKI_SERVE_KEY="secret") as (process, address):
        body = {**ask(image_part(), "What?"), "model": "run"}
        assert post(address, body).status_code == 401
        response = post(address, body, headers={"authorization": "Bearer secret"})
        assert response.status_code == 200 and response.json()["usage"]["total_tokens"] <= 300
        assert http("GET", f"{address}/health").json()["model"] == "run"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0
        assert [line.split()[4] for line in log.splitlines()] == ["401", "200", "200"], log


def run_tool(*arguments: str) -> tuple[int, str]:
    """Exit code and messages of the tool; it must not listen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("AKI_SERVE_KEY", raising=False)
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(map(str, texts))))
        return serve.main(arguments), "\n".join(lines)


def test_mistakes_are_one_line(saved: tuple[LoadedModel, Path], tmp_path: Path) -> None:
    run = str(saved[1] / "run")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        code, message = run_tool(run, "--port", port)
        assert code == 2 and message.startswith("serve: Cannot listen on 127.0.0.1 port") and "--port 0" in message
    for arguments, words in (
        ([run, "--host", "0.0.0.0"], "set a key in the environment variable AKI_SERVE_KEY"),
        ([run, "--host", "no.such.name.invalid"], "AKI_SERVE_KEY"),
        ([run, "--host", "no.such.name.invalid", "--no_key"], "is no address of this machine"),
        ([str(tmp_path / "absent"), "--port", "0"], "does not exist"),
        ([run, "--port", "0", "--tokenizer", str(tmp_path)], "tokenizer"),
        ([run, "--port", "0", "--body_megabytes", "600"], "--buffer_megabytes"),
    ):
        code, message = run_tool(*arguments)
        assert code == 2 and words in message and "\n" not in message, message
