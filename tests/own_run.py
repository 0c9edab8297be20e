"""Runs on files of one's own, small enough for many ranks: images, conversations in three formats, a tiny model."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow
from PIL import Image
from pyarrow import parquet

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer

ROOT = Path(__file__).resolve().parents[1]
NUM_PICTURES = 6
FLAGS = {
    "--validation.interval": 0,
    "--model.vision.hidden_size": 16, "--model.vision.num_heads": 2, "--model.vision.intermediate_size": 24,
    "--model.resampler.num_latents": 4, "--model.resampler.num_layers": 1, "--model.resampler.num_heads": 2,
    "--model.resampler.head_dim": 8, "--model.decoder.hidden_size": 32, "--model.decoder.num_layers": 4,
    "--model.decoder.intermediate_size": 48, "--data.max_text_tokens": 96, "--train.steps": 4,
    "--train.global_batch_size": 8, "--train.micro_batch_size": 2, "--optimizer.warmup_steps": 1,
    "--optimizer.beta2": 0.95, "--optimizer.eps": 1e-5, "--checkpoint.interval": 2, "--log.wandb": "disabled",
    "--log.tensorboard": "false", "--init.weights": "null",
}  # fmt: skip
"""Layers for four pipeline stages. With a smaller eps, rounding of gradients near zero would become differences."""

SOURCES = [
    {"name": "asked", "format": "llava", "path": "llava.jsonl", "images": "pics"},
    {"name": "told", "format": "messages", "path": "messages.json", "images": "pics"},
    {"name": "table", "format": "parquet", "path": "table.parquet"},
]


def _picture(number: int) -> bytes:
    """A picture in which no two pixels are alike."""
    buffer = io.BytesIO()
    pixels = bytes((7 * number + 11 * place) % 256 for place in range(20 * 20 * 3))
    Image.frombytes("RGB", (20, 20), pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _images(number: int) -> list[int]:
    """Numbers of the pictures of a record: none, one, two or three."""
    return [(number + offset) % NUM_PICTURES for offset in range(number % 4)]


def _prompts(number: int, marker: str) -> list[str]:
    """Two questions; the images of a record stand before, within and after the first one, the third in the second."""
    markers = [marker] * len(_images(number))
    first = f"{' '.join(markers[:1])} What is picture {number}? {' '.join(markers[1:2])}".strip()
    return [first, f"And {' '.join(markers[2:])} now?"]


def _llava(number: int) -> dict[str, Any]:
    first, second = _prompts(number, "<image>")
    texts = [("human", first), ("gpt", f"Picture {number}."), ("human", second), ("gpt", f"It is {number % 3}.")]
    record = {"conversations": [{"from": speaker, "value": text} for speaker, text in texts]}
    images = [f"{picture}.png" for picture in _images(number)]
    return record | ({"image": images} if images else {})


def _messages(number: int, *, inside: bool) -> list[dict[str, Any]]:
    """OpenAI's messages; images as paths in their parts, or (not ``inside``) as parts that stand for files beside."""
    images, messages = iter(_images(number)), []
    for prompt, answer in zip(_prompts(number, "\0"), (f"Number {number}.", "Yes."), strict=True):
        parts: list[dict[str, Any]] = []
        for position, text in enumerate(prompt.split("\0")):
            if position:
                picture = next(images)
                parts.append({"type": "image", "image": f"{picture}.png"} if inside else {"type": "image"})
            if text:
                parts.append({"type": "text", "text": text})
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return messages


def _row(number: int) -> dict[str, Any]:
    """A row with images in it."""
    return {
        "messages": [
            message
            if message["role"] == "user"
            else message | {"content": [{"type": "text", "text": message["content"]}]}
            for message in _messages(number, inside=False)
        ],
        "images": [{"bytes": _picture(picture), "path": f"{picture}.png"} for picture in _images(number)],
    }


def write_own_data(root: Path, *, count: int = 24) -> Path:
    """Write ``count`` records in each format, each with up to three images in two turns, and a tokenizer."""
    (root / "pics").mkdir(parents=True)
    for number in range(NUM_PICTURES):
        (root / f"pics/{number}.png").write_bytes(_picture(number))
    (root / "llava.jsonl").write_text("".join(json.dumps(_llava(number)) + "\n" for number in range(count)))
    told = [{"messages": _messages(number, inside=True)} for number in range(count)]
    (root / "messages.json").write_text(json.dumps(told))
    parquet.write_table(pyarrow.Table.from_pylist([_row(n) for n in range(count)]), root / "table.parquet")
    write_tokenizer(root / "tokenizer")
    return root


def own_run(root: Path, folder: Path, *flags: str) -> RunConfig:
    """Return a run on the data of ``root`` in ``folder``; ``flags`` come last."""
    words = [str(word) for flag in FLAGS.items() for word in flag]
    words += ["--data.root", str(root), "--data.tokenizer", str(root / "tokenizer"), "--run.dir", str(folder)]
    config = ROOT / "configs/demo/own.yaml"
    words += ["--data.sources", json.dumps(SOURCES), *flags]
    return load_run(words, default_config=config, prog="sft.py", description="")
