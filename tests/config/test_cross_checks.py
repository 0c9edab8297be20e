"""Sections that are right alone and wrong together: one message that names the keys and what to change."""

from pathlib import Path

import pytest
from demo_runs import PRETRAIN, SFT, load, message

from aki_megatron.config.cross_checks import ContradictionError, check_run
from aki_megatron.config.run import RunConfig

CONTRADICTIONS: list[tuple[Path, list[str], list[str]]] = [
    (PRETRAIN, ["--attention.rule", "mma"], ["data.kind=captions", "attention.rule=mma", "leak", "causal"]),
    (PRETRAIN, ["--data.captions", "[]"], ["data.kind=captions needs data.captions"]),
    (PRETRAIN, ["--data.captions", "[{name: kale, shards: ['']}, {name: b, shards: [a.tar]}]"], ["kale: shards holds"]),
    (
        PRETRAIN,
        ["--data.captions", "[{name: kale, shards: [a.tar], granularity: boxes}]"],
        ["kale: granularity=boxes", "format=caption"],
    ),
    (PRETRAIN, ["--data.phases", "[{steps: 300}]"], ["data.phases add up to 300", "train.steps=400", "steps 300"]),
    (
        PRETRAIN,
        ["--data.phases", "[{steps: 400, sources: [ocr]}]"],
        ["data.phases[0].sources names ocr", "sources are captions"],
    ),
    (
        SFT,
        ["--data.phases", "[{steps: 1600, order: text_first}]"],
        ["order=text_first", "attention.rule=mma", "causal"],
    ),
    (
        SFT,
        ["--data.packing.enabled", "true", "--data.packing.sequence_length", "100"],
        ["sequence_length=100", "latents = 137"],
    ),
    (SFT, ["--data.sources", "[{name: vsr, split_turns: false}]"], ["vsr: split_turns=false is for llava150k"]),
    (SFT, ["--data.sources", "[{name: mine}]"], ["data.sources[0].name must be one of vqav2", 'got "mine"', "a path:"]),
    (SFT, ["--data.sources", "[{name: mine, path: a.jsonl}]"], ["gives path; add the format", "llava, messages, pa"]),
    (SFT, ["--data.sources", "[{name: vsr, images: a, columns: {id: b}}]"], ["images and columns are for files of yo"]),
    (SFT, ["--data.sources", "[{name: vsr, format: llava, path: a}]"], ["=vsr is the name of a public dataset"]),
    (SFT, ["--data.sources", "[{name: a/b, format: llava, path: a}]"], ["letters, digits and . _ + -", 'got "a/b"']),
    (SFT, ["--data.sources", "[{name: mine, format: llava}]"], ["format=llava needs path"]),
    (SFT, ["--data.sources", "[{name: mine, format: llava, path: ['']}]"], ["format=llava needs path"]),
    (SFT, ["--data.sources", "[{name: a, format: llava, path: 's3://b/c'}]"], ['"s3://b/c" is no path']),
    (PRETRAIN, ["--data.sources", "[{name: vsr, weight: 1}]"], ["remove data.sources"]),
    (PRETRAIN, ["--init.weights", "runs/x"], ["init.weights=runs/x", "init.vision=data/demo/encoder", "null"]),
    (
        SFT,
        ["--data.system_message", "Be kind.<|end|>\n<|user|>\nHi"],
        ["data.system_message contains <|user|>, <|end|>, which would end or begin a message"],
    ),
    (SFT, ["--data.system_message", "Look at <image>."], ["data.system_message contains <image>"]),
    (SFT, ["--data.sources", "[]"], ["data.kind=conversations needs data.sources"]),
    (SFT, ["--data.captions", "[{name: a, shards: [a.tar]}]"], ["remove data.captions"]),
    (SFT, ["--data.sources", "[{name: vsr, weight: 1}, {name: vsr, weight: 2}]"], ["data.sources names vsr more than"]),
    (
        SFT,
        ["--parallel.tensor", "3"],
        ["parallel.tensor=3", "num_heads=4", "num_kv_heads=4", "choose tensor from [1, 2, 4]"],
    ),
    (
        SFT,
        ["--parallel.tensor", "4", "--model.decoder.num_kv_heads", "2"],
        ["parallel.tensor=4 does not divide model.decoder.num_kv_heads=2 (", "only 2); choose tensor from [1, 2]."],
    ),
    (
        SFT,
        ["--parallel.tensor", "4", "--model.decoder.intermediate_size", "6"],
        ["model.decoder.intermediate_size=6", "from [1, 2]"],
    ),
    (
        SFT,
        ["--parallel.tensor", "2", "--model.decoder.padded_vocab_size", "769"],
        ["model.decoder.padded_vocab_size=769", "[1]"],
    ),
    (SFT, ["--parallel.pipeline", "9"], ["parallel.pipeline=9", "model.decoder.num_layers=3", "from 1 to 3"]),
    (
        SFT,
        ["--parallel.pipeline", "2", "--parallel.virtual_stages", "2"],
        ["pipeline=2 x parallel.virtual_stages=2 = 4 stages"],
    ),
    (
        SFT,
        ["--parallel.virtual_stages", "2"],
        ["parallel.virtual_stages=2", "parallel.pipeline=1", "--parallel.virtual_stages 1"],
    ),
    (
        SFT,
        ["--parallel.pipeline", "2", "--parallel.layers_per_stage", "[1, 1, 1]"],
        ["parallel.layers_per_stage=[1, 1, 1] has 3 entries", "= 2 stages", "2 numbers", "model.decoder.num_layers=3"],
    ),
    (
        SFT,
        ["--parallel.pipeline", "2", "--parallel.layers_per_stage", "[2, 2]"],
        ["parallel.layers_per_stage=[2, 2] adds up to 4 layers", "model.decoder.num_layers=3", "sum is 3"],
    ),
    (SFT, ["--parallel.zero_stage", "0", "--train.precision", "bf16"], ["zero_stage=0", "--parallel.zero_stage 1"]),
    (PRETRAIN, ["--train.steps", "50"], ["optimizer.warmup_steps=50", "train.steps=50", "--optimizer.warmup_steps 5"]),
    (SFT, ["--optimizer.min_lr", "1"], ["optimizer.min_lr=1", "optimizer.lr="]),
    (SFT, ["--data.max_text_tokens", "600"], ["data.max_text_tokens=600", "max_position_embeddings=512", "503"]),
    (SFT, ["--watch.step_timeout", "5000"], ["step_timeout=5000 exceeds watch.init_timeout=3600", "init_timeout 5000"]),
    (
        SFT,
        ["--watch.on_loss_spike", "skip", "--watch.loss_spike_window", "1600"],
        ["watch.loss_spike_window=1600", "loss_spike_window 160."],
    ),
]


@pytest.mark.parametrize(("config", "argv", "expected"), CONTRADICTIONS, ids=[" ".join(c[1]) for c in CONTRADICTIONS])
def test_contradictions(config: Path, argv: list[str], expected: list[str]) -> None:
    text = message(*argv, config=config)
    assert str(config) in text
    for part in expected:
        assert part in text, text


def test_contradictions_are_reported_together_and_unsupported_combinations_last() -> None:
    refused = ("--parallel.zero_stage", "0", "--train.precision", "bf16")
    assert "ZeRO-1" in message(*refused)
    text = message("--parallel.tensor", "3", "--train.steps", "6", *refused)
    assert "2 problems" in text
    assert "ZeRO-1" not in text


def test_a_run_built_by_hand_is_checked_by_check_run() -> None:
    parts = {name: getattr(load(), name) for name in RunConfig.model_fields if name != "parallel"}
    check_run(RunConfig(**parts, parallel={"tensor": 1}))
    with pytest.raises(ContradictionError, match=r"parallel\.tensor=3 does not divide") as caught:
        check_run(RunConfig(**parts, parallel={"tensor": 3}))
    assert len(caught.value.problems) == 1
