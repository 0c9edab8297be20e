"""Exported folders of six models on several releases of transformers: logits, greedy tokens and chats equal ours.

The installed release is always run. Others are named by folders, each put first on the path of a subprocess:

    pip install --target /tmp/tf500 --no-deps transformers==5.0.0 "huggingface_hub<2" "tokenizers<0.23"
    pip install --target /tmp/tf5121 --no-deps transformers==5.12.1 "huggingface_hub<2" "tokenizers<0.23"
    pip install --target /tmp/tf524 --no-deps transformers==5.24.0
    AKI_TRANSFORMERS_FOLDERS=/tmp/tf500:/tmp/tf5121:/tmp/tf524 pytest tests/parity/test_releases.py
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_folders import chat_folder
from exported_aki import LATENTS, batch, config, inputs, prompts, random_stage, write
from PIL import Image

from aki_megatron.checkpoint.model_card import draw_example
from aki_megatron.config.data import SYSTEM_MESSAGE
from aki_megatron.data.image import decode_image, normalize
from aki_megatron.data.media import media_decoders
from aki_megatron.data.template import Template
from aki_megatron.data.tokenizer import Tokenizer
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.runner import collate_prompts, read_prompt
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.stage import Stage
from aki_megatron.types import Conversation, Modality, Turn, image_items, stack_ids

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Phi-3.5": ("phi3", {}),
    "LLaMA-3.2": ("llama", {}),
    "Qwen2.5": ("qwen2", {}),
    "Qwen3-0.6B": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "Qwen3-1.7B": ("qwen3", {"tie_word_embeddings": True}),
    "Qwen3-8B": ("qwen3", {}),
}
"""Published model -> family, and what differs from its other models."""

FOLDERS = [Path(name) for name in os.environ.get("AKI_TRANSFORMERS_FOLDERS", "").split(os.pathsep) if name]
IMAGE = Image.new("RGB", (9, 7), (200, 30, 90))
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Folder of each model, and what our model and our template give for the same inputs."""
    root = tmp_path_factory.mktemp("exported")
    IMAGE.save(root / "image.png")
    return {name: export_model(root, name, *model) for name, model in MODELS.items()}


def export_model(root: Path, name: str, family: str, decoder: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    source = chat_folder(root / "published" / name, family)
    tokenizer = Tokenizer(source, FAMILIES[family].chat)
    model_config = config(family, padded_vocab_size=640, vocab_size=tokenizer.image_id, **decoder)
    stage = random_stage(model_config)
    folder = write(stage, root / name, tokenizer=source)
    texts, images = prompts()
    alone = inputs(texts[1:2], torch.zeros(0, 3, 12, 12))
    torch.save(
        {
            "batch": inputs(texts, torch.cat(images)),
            "alone": {key: alone[key] for key in ("input_ids", "attention_mask")},
            "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in it?"}]}],
            "image": str(root / "image.png"),
        },
        folder / "inputs.pt",
    )
    return folder, expected_outputs(stage, tokenizer, root / "image.png")


@torch.no_grad()
def expected_outputs(stage: Stage, tokenizer: Tokenizer, image: Path) -> dict[str, Any]:
    texts, images = prompts()
    given = batch(texts, torch.cat(images))
    logits = stage.logits(given.token_ids, stack_ids(given), given.media)[given.modality_ids != Modality.PAD]
    alone = batch(texts[1:2], torch.zeros(0, 3, 12, 12))
    conversation = Conversation("key", (Turn("What is in it?", "."),), image_items(b"x"))
    template = Template(tokenizer, {Modality.IMAGE: LATENTS}, 512, SYSTEM_MESSAGE)
    prompt = template.render_prompt(conversation)
    text = "".join(part.text for part in template.conversation_parts(conversation)[:-1])
    size = stage.config.vision.image_size
    pixels = normalize([decode_image(image.read_bytes(), size, key="image")], size)
    return {
        "logits": logits[:, : stage.config.decoder.total_vocab_size],
        "tokens": generate(stage, given, stop_ids=(), max_new_tokens=10),
        "alone": generate(stage, alone, stop_ids=(), max_new_tokens=10),
        "chat": [text, [prompt.token_ids], [prompt.modality_ids], pixels.tolist()],
        "card": [example_answer(stage, template, image.with_name("example.png"))] * 2,
    }


def example_answer(stage: Stage, template: Template, image: Path) -> str:
    """What our code answers to the question in the model card's example."""
    image.write_bytes(draw_example())
    prompt = read_prompt(
        Conversation("", (Turn("What is in the picture?", ""),), image_items(image)),
        template,
        media_decoders(stage.config),
    )
    ((*tokens,),) = generate(
        stage,
        collate_prompts([prompt], template, 12),
        stop_ids=template.tokenizer.stop_ids,
        max_new_tokens=64,
    )
    return template.tokenizer.decode(tokens)


@pytest.mark.parametrize("release", [None, *FOLDERS], ids=str)
def test_exports_run_alike_on_every_release(
    release: Path | None, exported: dict[str, tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("run_exported.py")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"} | ({"PYTHONPATH": str(release)} if release else {})
    finished = subprocess.run(
        [sys.executable, str(script), *(str(folder) for folder, _ in exported.values())],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert release is None or list(release.glob(f"transformers-{result['release']}.dist-info"))
    for name, (folder, expected) in exported.items():
        found = result["outputs"][str(folder)]
        difference = (torch.tensor(found["logits"]) - expected["logits"]).abs().max()
        assert difference <= TOLERANCE * expected["logits"].abs().max(), name
        assert found["embedding"] == 640
        assert "past_keys" in found["refused"], found["refused"]
        found["card"][1] = ast.literal_eval(found["card"][1])[0]  # it prints a list
        for key in ("tokens", "alone", "chat", "card"):
            assert found[key] == expected[key], (name, key)
