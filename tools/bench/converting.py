"""Time and peak memory of every conversion at the size of AKI-4B, with random weights.

    python tools/bench/converting.py --work /scratch/convert        # about 52 GB of disk, removed at the end

Makes the folders of a language model and of SigLIP with random bfloat16 weights, then runs tools/convert.py on them, a
process for each command: from-hf, to-hf, to-official in fp32, from-official, and the same through a training checkpoint
(.pt). Every command proves what it wrote, and each checkpoint is compared with the first.
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
from aki_megatron.checkpoint.hf_config import describe_language, describe_vision
from aki_megatron.checkpoint.tensors import NameTable, TensorFact, View, to_external
from aki_megatron.checkpoint.weight_names import language_names, model_shapes, vision_names
from aki_megatron.checkpoint.writers import write_shards
from aki_megatron.config.model import ModelConfig

TOOL = Path(__file__).parents[1] / "convert.py"
END = "<|endoftext|>"
GAIN = 1.0
"""Weights are drawn with GAIN / sqrt(inputs): a lost mask changes the logits by as much as they are. With 2.0 the 32
layers amplify fp32's rounding to 2e-4 of the logits, beyond the limit of the check that ends a conversion."""


def random_source(config: ModelConfig, names: NameTable) -> View:
    """Random tensors under stock names, drawn when they are asked for."""
    shapes = model_shapes(config)
    facts = {name: TensorFact(shapes[name], torch.bfloat16) for name in names}

    def draw(name: str) -> torch.Tensor:
        shape = facts[name].shape
        if len(shape) == 1:
            return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
        inputs = facts[name].elements // shape[0]
        std = 1.0 if "embed" in name else GAIN / inputs**0.5
        return torch.empty(shape, dtype=torch.bfloat16).normal_(std=std)

    ours = View(facts, {name: lambda name=name: draw(name) for name in facts})  # type: ignore[misc]
    return to_external(ours, names, config.decoder)


def make_folders(work: Path, config: ModelConfig) -> None:
    """The two folders as they would have been downloaded."""
    torch.manual_seed(0)
    parts = {
        "lm": (language_names(config.decoder), describe_language(config.decoder)),
        "siglip": (vision_names(config.vision, "vision_model."), describe_vision(config.vision)),
    }
    for title, (names, described) in parts.items():
        (work / title).mkdir(parents=True)
        write_shards(work / title, random_source(config, names))
        (work / title / "config.json").write_text(json.dumps(described))
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(config.decoder.vocab_size - 2)}, "w0"))
    words.add_special_tokens([AddedToken(END, special=True)])  # the last but <pad>, which from-hf adds
    words.save(str(work / "lm" / "tokenizer.json"))
    told = {"eos_token": END, "bos_token": "w0", "tokenizer_class": "PreTrainedTokenizerFast"}
    (work / "lm" / "tokenizer_config.json").write_text(json.dumps(told))


def measure(title: str, words: Sequence[object]) -> None:
    """Run one conversion and print its seconds, its peak of resident memory, and the size of what it wrote."""
    command = [sys.executable, str(TOOL), *map(str, words)]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed")
    out = Path(str(words[words.index("--out") + 1]))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{title:44} {seconds:6.0f} s  {used.ru_maxrss * 1024 / 1e9:6.2f} GB peak  {size / 1e9:6.2f} GB written")
    print("\n".join(f"    {line}" for line in printed.splitlines() if line.startswith("check: ")), flush=True)


def assert_same(one: Path, other: Path, dtype: torch.dtype) -> None:
    """Every tensor of two checkpoints is the same, bit for bit, in this precision."""
    first, second = (CheckpointSource(path, checked=False) for path in (one, other))
    assert first.facts.keys() == second.facts.keys()
    for name in first.facts:
        assert torch.equal(first.get(name).to(dtype), second.get(name).to(dtype)), name
    print(f"{one.name} and {other.name}: {len(first.facts)} tensors are the same, bit for bit")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder to work in; must not exist, is removed")
    work = parser.parse_args().work
    work.mkdir(parents=True)
    try:
        start = time.monotonic()
        make_folders(work, ModelConfig())
        print(f"random weights drawn in {time.monotonic() - start:.0f} s", flush=True)
        first = ("from-hf", "--lm", work / "lm", "--vision", work / "siglip", "--out", work / "start")
        measure("from-hf, bf16", first)
        measure("to-hf, bf16", ("to-hf", work / "start", "--out", work / "export"))
        shutil.rmtree(work / "export")
        measure("to-official, fp32", ("to-official", work / "start", "--dtype", "fp32", "--out", work / "release"))
        measure("from-official, fp32", ("from-official", work / "release", "--out", work / "aki"))
        shutil.rmtree(work / "release")
        assert_same(work / "start", work / "aki", torch.float32)
        training = ("to-official", work / "aki", "--training", "--out", work / "training")
        measure("to-official --training (.pt), fp32", training)
        shutil.rmtree(work / "aki")
        again = ("from-official", work / "training" / "checkpoint_0.pt", "--vision", work / "siglip")
        measure("from-official (.pt) and SigLIP, fp32", (*again, "--out", work / "again"))
        assert_same(work / "start", work / "again", torch.float32)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
