"""Time and peak memory of every conversion at the size of AKI-4B, with random weights.

    python tools/bench/converting.py --work /scratch/convert        # about 52 GB of disk, removed at the end

Write the folders of a language model and of SigLIP with random bfloat16 weights, then run tools/convert.py on them, one
process per command: from-hf, to-hf, to-official in fp32, from-official, and the same through a training checkpoint
(.pt). Every command checks the logits of what it wrote, and each checkpoint is compared with the first.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models

from aki_megatron.checkpoint.dcp_io import CheckpointSource
from aki_megatron.checkpoint.hf_config import language_config_json, vision_config_json
from aki_megatron.checkpoint.shapes import model_shapes
from aki_megatron.checkpoint.tensors import LazyTensors, NameTable, TensorSpec, to_external
from aki_megatron.checkpoint.weight_names import language_names, vision_names
from aki_megatron.checkpoint.writers import write_shards
from aki_megatron.config.model import ModelConfig
from aki_megatron.families.registry import FAMILIES

TOOL = Path(__file__).parents[1] / "convert.py"
END = "<|endoftext|>"
GAIN = 1.0
"""Weights have the standard deviation GAIN / sqrt(inputs): then a lost mask changes the logits by their own size. With
2.0 the 32 layers amplify fp32 rounding to 2e-4 of the logits."""


def random_source(config: ModelConfig, names: NameTable) -> LazyTensors:
    """Random tensors under stock names, generated when they are asked for."""
    shapes = model_shapes(config)
    specs = {name: TensorSpec(shapes[name], torch.bfloat16) for name in names}

    def generate(name: str) -> torch.Tensor:
        shape = specs[name].shape
        if len(shape) == 1:
            return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
        inputs = specs[name].numel // shape[0]
        std = 1.0 if "embedding" in name else GAIN / inputs**0.5
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std)

    native = LazyTensors(specs, {name: lambda name=name: generate(name) for name in specs})  # type: ignore[misc]
    return to_external(native, names, config.decoder)


def write_folders(work: Path, config: ModelConfig) -> None:
    """Write the two folders as they would be downloaded."""
    torch.manual_seed(0)
    parts = {
        "lm": (language_names(config.decoder), language_config_json(config.decoder)),
        "siglip": (vision_names(config.vision, "vision_model."), vision_config_json(config.vision)),
    }
    for title, (names, config_json) in parts.items():
        (work / title).mkdir(parents=True)
        write_shards(work / title, random_source(config, names))
        (work / title / "config.json").write_text(json.dumps(config_json))
    markers = [name for name in FAMILIES[config.decoder.family].chat.special_tokens if name != END]
    num_words = config.decoder.vocab_size - len(markers) - 2
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(num_words)}, "w0"))
    # END is the last but <pad>, which from-hf adds
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in (*markers, END)])
    tokenizer.save(str(work / "lm" / "tokenizer.json"))
    settings = {"eos_token": END, "bos_token": "w0", "tokenizer_class": "PreTrainedTokenizerFast"}
    (work / "lm" / "tokenizer_config.json").write_text(json.dumps(settings))


def measure(title: str, arguments: Sequence[object]) -> None:
    """Run one conversion and print its seconds, its peak of resident memory, and the size of what it wrote."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    out = Path(str(arguments[arguments.index("--out") + 1]))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{title:44} {seconds:6.0f} s  {usage.ru_maxrss * 1024 / 1e9:6.2f} GB peak  {size / 1e9:6.2f} GB written")
    print(
        "\n".join(f"    {line}" for line in printed.splitlines() if line.startswith(("check: ", "generation: "))),
        flush=True,
    )


def assert_equal(one: Path, other: Path, dtype: torch.dtype) -> None:
    """Compare all tensors of two checkpoints bit for bit in this dtype."""
    first, second = (CheckpointSource(path, verify=False) for path in (one, other))
    assert first.specs.keys() == second.specs.keys()
    for name in first.specs:
        assert torch.equal(first.get(name).to(dtype), second.get(name).to(dtype)), name
    print(f"{one.name} and {other.name}: {len(first.specs)} tensors are the same, bit for bit")


def main() -> None:
    """Measure every conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to work in; must not exist, is removed")
    work = parser.parse_args().work
    work.mkdir(parents=True)
    try:
        start = time.monotonic()
        write_folders(work, ModelConfig())
        print(f"random weights written in {time.monotonic() - start:.0f} s", flush=True)
        first = ("from-hf", "--lm", work / "lm", "--vision", work / "siglip", "--out", work / "start")
        measure("from-hf, bf16", first)
        measure("to-hf, bf16", ("to-hf", work / "start", "--out", work / "export"))
        shutil.rmtree(work / "export")
        measure("to-official, fp32", ("to-official", work / "start", "--dtype", "fp32", "--out", work / "release"))
        measure("from-official, fp32", ("from-official", work / "release", "--out", work / "aki"))
        shutil.rmtree(work / "release")
        assert_equal(work / "start", work / "aki", torch.float32)
        training = ("to-official", work / "aki", "--training", "--out", work / "training")
        measure("to-official --training (.pt), fp32", training)
        shutil.rmtree(work / "aki")
        again = ("from-official", work / "training" / "checkpoint_0.pt", "--vision", work / "siglip")
        measure("from-official (.pt) and SigLIP, fp32", (*again, "--out", work / "again"))
        assert_equal(work / "start", work / "again", torch.float32)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
