"""Families with other markers than Phi-3's train and answer: tokenizer, data, model, optimizer, greedy answers."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from chat_folders import chat_folder
from data_files import write_sources
from rich.console import Console

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.data.pipeline import build_template, build_tokenizer
from aki_megatron.data.sources import open_sources
from aki_megatron.data.tokenizer import grow_tokenizer
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.runner import answer_all, prompt_batch
from aki_megatron.model.stage import build_model
from aki_megatron.parallel.topology import Topology
from aki_megatron.train.build import build_engine, build_steps, cut_model

pytestmark = pytest.mark.distributed
SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"
STEPS, LONGEST_ANSWER = 12, 8


def demo(root: Path, family: str) -> RunConfig:
    """The demo's model, smaller, over one question that is asked again and again."""
    write_sources(root, count=1)
    vocabulary = grow_tokenizer(chat_folder(root / "published", family), root / "tokenizer")
    decoder = {
        "family": family, "num_layers": 2, "hidden_size": 64, "intermediate_size": 96, "padded_vocab_size": 512,
        "vocab_size": vocabulary.vocab_size, "num_added_tokens": vocabulary.num_added_tokens,
    }  # fmt: skip
    flags = [word for name, value in decoder.items() for word in (f"--model.decoder.{name}", str(value))]
    flags += [
        "--data.root",
        str(root),
        "--data.tokenizer",
        str(root / "tokenizer"),
        "--data.sources",
        "[{name: vqav2}]",
    ]
    flags += ["--data.max_text_tokens", "256", "--train.global_batch_size", "2", "--train.micro_batch_size", "1"]
    return load_run([*flags, "--parallel.zero_stage", "0"], default_config=SFT, prog="sft.py", description="")


def train_and_answer(topology: Topology, config: RunConfig) -> tuple[list[float], list[str], list[str]]:
    """The losses of some steps, what the trained model answers to what it was asked, and its first two tokens."""
    tokenizer = build_tokenizer(config)
    loader = build_steps(config, tokenizer, topology, Console(quiet=True))
    engine = build_engine(config, cut_model(config), topology, fill=lambda stage: None)
    try:
        losses = [engine.train_step(step.batches, lr=3e-3).loss for step in islice(loader.steps(0), STEPS)]
    finally:
        loader.close()
    model = build_model(config.model, rule=config.attention.rule).eval()
    with torch.no_grad():
        for name, weight in engine.weights():
            model.get_parameter(name).copy_(weight)
    questions = list(open_sources(config.data.root, ["vqav2"], "train")["vqav2"])
    template = build_template(config, tokenizer)
    given = [answer.given for answer in answer_all(model, template, questions, max_new_tokens=LONGEST_ANSWER)]
    prompts = prompt_batch(questions, template, config.model.vision.image_size)
    (first,) = generate(model, prompts, stop_ids=(), max_new_tokens=2)
    return losses, given, [tokenizer.token(token) for token in first]


@pytest.mark.parametrize(("family", "end"), [("llama", "<|eot_id|>"), ("qwen2", "<|im_end|>")])
def test_a_family_learns_an_answer_and_where_it_ends(run_on, family: str, end: str, tmp_path: Path) -> None:
    ((losses, answers, tokens),) = run_on(1, train_and_answer, demo(tmp_path, family))
    assert losses[-1] < 0.1 * losses[0]
    assert (answers, tokens) == (["1"], ["1", end])
