"""Families with other chat formats than Phi-3's, and one that the project does not have, train and generate."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from chat_folders import chat_folder
from data_files import write_sources
from toy_family import NAME, registered, tokenizer_folder

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.console import IsolatedConsole
from aki_megatron.data.bad_samples import BadSampleBudget
from aki_megatron.data.media import media_decoders
from aki_megatron.data.pipeline import build_template, build_tokenizer
from aki_megatron.data.sources import open_sources
from aki_megatron.data.tokenizer import grow_tokenizer
from aki_megatron.evaluate.generate import generate
from aki_megatron.evaluate.runner import collate_prompts, predict, read_prompt
from aki_megatron.model.stage import build_model
from aki_megatron.parallel.topology import Topology
from aki_megatron.train.build import build_engine, build_loader, partition_layers

pytestmark = pytest.mark.distributed
SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"
STEPS, MAX_NEW_TOKENS = 12, 8


def demo(root: Path, family: str) -> RunConfig:
    """The demo's model, smaller, with a data set of one question."""
    write_sources(root, count=1)
    published = root / "published"
    source = tokenizer_folder(published) if family == NAME else chat_folder(published, family)
    vocabulary = grow_tokenizer(source, root / "tokenizer")
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
    """Losses of STEPS steps, the trained model's response to the question, and the first two tokens of it."""
    tokenizer = build_tokenizer(config)
    loader = build_loader(config, tokenizer, topology, IsolatedConsole(quiet=True))
    engine = build_engine(config, partition_layers(config), topology, init_weights=lambda stage: None)
    try:
        losses = [engine.train_step(step.batches, lr=3e-3).loss for step in islice(loader.steps(0), STEPS)]
    finally:
        loader.close()
    model = build_model(config.model, attention=config.attention).eval()
    with torch.no_grad():
        for name, weight in engine.named_weights():
            model.get_parameter(name).copy_(weight)
    questions = list(open_sources(config.data.root, ["vqav2"], "train")["vqav2"])
    template = build_template(config, tokenizer)
    bad_samples = BadSampleBudget(0.0)
    predictions = predict(model, template, questions, bad_samples=bad_samples, max_new_tokens=MAX_NEW_TOKENS)
    answers = [prediction.generated_answer for prediction in predictions]
    image_size = config.model.vision.image_size
    decoders = media_decoders(config.model)
    prompts = [read_prompt(question, template, decoders) for question in questions]
    batch = collate_prompts(prompts, template, image_size)
    (first,) = generate(model, batch, stop_ids=(), max_new_tokens=2)
    return losses, answers, [tokenizer.token_name(token) for token in first]


def train_with_the_toy_family(topology: Topology, config: RunConfig) -> tuple[list[float], list[str], list[str]]:
    with registered():
        return train_and_answer(topology, config)


@pytest.mark.parametrize(("family", "end"), [("llama", "<|eot_id|>"), ("qwen2", "<|im_end|>"), (NAME, "<|end|>")])
def test_a_family_learns_an_answer_and_where_it_ends(run_on, family: str, end: str, tmp_path: Path) -> None:
    with registered():
        config = demo(tmp_path, family)
    train = train_with_the_toy_family if family == NAME else train_and_answer
    ((losses, answers, tokens),) = run_on(1, train, config)
    assert losses[-1] < 0.1 * losses[0]
    assert (answers, tokens) == (["1"], ["1", end])
