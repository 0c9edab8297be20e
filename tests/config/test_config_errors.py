"""Each wrong input as a new user would try it: one message that names the key, what was got and what is allowed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from aki_megatron.config.cross_checks import check_world, data_size, micro_batch_size
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.config.yaml_file import read_yaml
from aki_megatron.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
SFT, PRETRAIN = ROOT / "configs/demo/sft.yaml", ROOT / "configs/demo/pretrain.yaml"


def load(*argv: str, config: Path = SFT) -> RunConfig:
    return load_run(
        ["--config", str(config), *argv], default_config=config, prog="launcher/sft.py", description="Test."
    )


def message(*argv: str, config: Path = SFT) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv, config=config)
    return str(caught.value)


def edited(tmp_path: Path, changes: dict[str, Any], base: Path = SFT) -> Path:
    """A copy of a config with dotted keys set, or removed where the value is `...`."""
    values = read_yaml(base).values
    for key, value in changes.items():
        *path, last = key.split(".")
        inner = values
        for part in path:
            inner = inner.setdefault(part, {})
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


FILE_MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    ({"train.step": 5}, ["unknown key train.step", "did you mean train.steps?"]),
    ({"train.lr": 5}, ["unknown key train.lr", "did you mean optimizer.lr?"]),
    ({"trian": {}}, ["unknown key trian", "did you mean train?"]),
    ({"qqq": 1}, ["unknown key qqq"]),
    ({"train.zzz": 1}, ["unknown key train.zzz", "the keys of train are steps, global_batch_size"]),
    (
        {"model.decoder.rope.thata": 1},
        ["unknown key model.decoder.rope.thata", "did you mean model.decoder.rope.theta?"],
    ),
    (
        {"data.sources": [{"name": "vsr", "wait": 1.0}]},
        ["unknown key data.sources[0].wait", "data.sources[0].weight"],
    ),
    ({"data.sources": [{"name": "vqa", "weight": 1.0}]}, ["data.sources[0].name must be one of vqav2", 'got "vqa"']),
    ({"data.sources": [{"name": "vsr", "weight": 0}]}, ["data.sources[0].weight must be a number > 0; got 0"]),
    ({"data.sources": "vqav2"}, ["data.sources must be a list of {name, weight, augment, split_turns}", 'got "vqav2"']),
    ({"data.sources": [3]}, ["data.sources[0] must be", "name, weight", "got 3"]),
    ({"train.steps": "8"}, ["train.steps must be a whole number > 0", 'got "8"']),
    ({"train.steps": 8.5}, ["train.steps must be a whole number > 0", "got 8.5"]),
    ({"train.steps": True}, ["train.steps must be a whole number > 0", "got true"]),
    ({"train.steps": 0}, ["train.steps must be a whole number > 0", "got 0"]),
    ({"train.precision": "fp16"}, ["train.precision must be one of bf16, fp32", 'got "fp16"']),
    ({"optimizer.lr": float("inf")}, ["optimizer.lr must be a number > 0"]),
    ({"optimizer.beta1": 1.0}, ["optimizer.beta1 must be a number >= 0 and < 1; got 1.0"]),
    ({"log.tensorboard": "yes"}, ["log.tensorboard must be true or false", 'got "yes"']),
    ({"run.dir": 7}, ["run.dir must be a path; got 7"]),
    ({"init.weights": 7}, ["init.weights must be a path or null; got 7"]),
    ({"data.captions": [{"name": "kale", "shards": [1]}]}, ["data.captions[0].shards[0]", "got 1"]),
    ({"train": 3}, ["train must be a mapping with the keys steps, global_batch_size", "got 3"]),
    ({"train": None}, ["train must be a mapping", "got null"]),
    ({"train.steps": ...}, ["train.steps is missing: give a whole number > 0"]),
    ({"optimizer": ...}, ["the section optimizer is missing: give lr, min_lr"]),
    ({"data.kind": "images"}, ["data.kind must be one of captions, conversations"]),
    ({"parallel.zero_stage": 4}, ["parallel.zero_stage must be one of 0, 1, 2, 3; got 4"]),
    ({"parallel.virtual_stages": 0}, ["parallel.virtual_stages must be a whole number > 0; got 0"]),
    ({"parallel.layers_per_stage": 3}, ["parallel.layers_per_stage must be a list, each a whole number > 0; got 3"]),
    ({"parallel.layers_per_stage": [3, 0]}, ["parallel.layers_per_stage[1] must be", "a whole number > 0", "got 0"]),
    ({"parallel.recompute": "some"}, ["parallel.recompute must be one of none, full"]),
    ({"deepspeed": []}, ["deepspeed must be a mapping"]),
    ({"model.decoder.num_heads": 7}, ["model.decoder", "hidden_size=", "num_heads=7", "choose num_heads from [1, 2, "]),
    ({"model.decoder.num_kv_heads": 3}, ["model.decoder", "num_heads=4", "num_kv_heads=3", "[1, 2, 4]"]),
    ({"model.vision.num_heads": 5}, ["model.vision", "hidden_size=64", "num_heads=5"]),
    ({"model.decoder.padded_vocab_size": 100}, ["model.decoder", "padded_vocab_size=100"]),
    ({"model.decoder.rope.rope_type": "longrope"}, ["model.decoder.rope.short_factor", "needs "]),
]


@pytest.mark.parametrize(("changes", "said"), FILE_MISTAKES, ids=[str(c) for c, _ in FILE_MISTAKES])
def test_mistakes_in_a_file(tmp_path: Path, changes: dict[str, Any], said: list[str]) -> None:
    file = edited(tmp_path, changes)
    text = message(config=file)
    assert text.startswith(f"{file}: ")
    for words in said:
        assert words in text, text


def test_all_mistakes_of_a_file_are_told_at_once_with_their_lines(tmp_path: Path) -> None:
    changes = {
        "train.step": 5,
        "optimizer.lr": "fast",
        "log.interval": 0,
        "checkpoint.interval": ...,
        "model.vision.num_heads": 7,
    }
    text = message(config=edited(tmp_path, changes))
    assert "5 problems" in text
    for words in (
        "train.step;",
        "optimizer.lr must be",
        "log.interval must be",
        "checkpoint.interval is missing",
        "model.vision",
    ):
        assert words in text
    assert text.count("line ") == 5


OVERRIDE_MISTAKES: list[tuple[list[str], list[str]]] = [
    (["--train.step", "5"], ["unknown flag --train.step; did you mean --train.steps?"]),
    (["--steps", "5"], ["unknown flag --steps; did you mean --train.steps?"]),
    (["--trian.steps=5"], ["unknown flag --trian.steps; did you mean --train.steps?"]),
    (["--lr", "5"], ["unknown flag --lr; did you mean --optimizer.lr?"]),
    (["--deepspeed", "x.json"], ["unknown flag --deepspeed; did you mean --ds_config?"]),
    (["--train", "x"], ["unknown flag --train"]),
    (["--train.steps"], ["--train.steps needs a value: a whole number > 0."]),
    (["--train.steps", "--train.seed", "3"], ["--train.steps needs a value"]),
    (["train.steps=5"], ["train.steps=5 belongs to no flag; overrides are written --section.key value."]),
    (["--config"], ["--config", "expected one argument"]),
    (["--local_rank", "zero"], ["--local_rank"]),
    (["--train.steps", "abc"], ["--train.steps", 'train.steps must be a whole number > 0; got "abc"']),
    (["--train.steps", "1e3"], ["train.steps must be a whole number > 0; got 1000.0"]),
    (["--train.steps="], ["train.steps must be a whole number > 0; got null"]),
    (["--train.precision", "fp16"], ["train.precision must be one of bf16, fp32", 'got "fp16"']),
    (["--optimizer.lr", "-1"], ["optimizer.lr must be a number > 0; got -1"]),
    (["--data.sources", "[{weight: 1}]"], ["data.sources[0].name is missing"]),
    (["--parallel.zero_stage", "4"], ["parallel.zero_stage must be one of 0, 1, 2, 3; got 4"]),
    (["--watch.on_loss_spike", "ignore"], ["watch.on_loss_spike must be one of off, skip, rollback, stop"]),
    (["--watch.step_timeout_factor", "1"], ["watch.step_timeout_factor must be a number > 1"]),
    (["--config", "none.yaml"], ["none.yaml: there is no such file"]),
]


@pytest.mark.parametrize(("argv", "said"), OVERRIDE_MISTAKES, ids=[" ".join(a) for a, _ in OVERRIDE_MISTAKES])
def test_mistakes_in_flags(argv: list[str], said: list[str]) -> None:
    text = message(*argv)
    for words in said:
        assert words in text, text


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
    (PRETRAIN, ["--data.sources", "[{name: vsr, weight: 1}]"], ["remove data.sources"]),
    (PRETRAIN, ["--init.weights", "runs/x"], ["init.weights=runs/x", "init.vision=data/demo/encoder", "null"]),
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
        ["parallel.layers_per_stage=[2, 2] deals out 4 layers", "model.decoder.num_layers=3", "sum is 3"],
    ),
    (SFT, ["--parallel.zero_stage", "0", "--train.precision", "bf16"], ["zero_stage=0", "--parallel.zero_stage 1"]),
    (PRETRAIN, ["--train.steps", "50"], ["optimizer.warmup_steps=50", "train.steps=50", "--optimizer.warmup_steps 5"]),
    (SFT, ["--optimizer.min_lr", "1"], ["optimizer.min_lr=1", "optimizer.lr="]),
    (SFT, ["--data.max_text_tokens", "600"], ["data.max_text_tokens=600", "max_position_embeddings=512", "503"]),
    (SFT, ["--watch.step_timeout", "5000"], ["step_timeout=5000 exceeds watch.init_timeout=3600", "seconds 5000"]),
    (
        SFT,
        ["--watch.on_loss_spike", "skip", "--watch.loss_spike_window", "1600"],
        ["watch.loss_spike_window=1600", "loss_spike_window 160."],
    ),
]


@pytest.mark.parametrize(("config", "argv", "said"), CONTRADICTIONS, ids=[" ".join(c[1]) for c in CONTRADICTIONS])
def test_contradictions(config: Path, argv: list[str], said: list[str]) -> None:
    text = message(*argv, config=config)
    assert str(config) in text
    for words in said:
        assert words in text, text


def test_contradictions_are_told_together_and_support_comes_last() -> None:
    refused = ("--parallel.zero_stage", "0", "--train.precision", "bf16")
    assert "ZeRO-1" in message(*refused)
    text = message("--parallel.tensor", "3", "--train.steps", "6", *refused)
    assert "2 problems" in text
    assert "ZeRO-1" not in text


def test_a_run_cannot_be_built_around_the_checks() -> None:
    run = load()
    with pytest.raises(ConfigError, match=r"parallel\.tensor=3 does not divide"):
        RunConfig(
            **{name: getattr(run, name) for name in RunConfig.model_fields if name != "parallel"},
            parallel={"tensor": 3},
        )


def test_overrides() -> None:
    run = load(
        *("--train.steps", "100", "--optimizer.lr=1e-3", "--train.precision", "bf16", "--run.dir", "2024"),
        *("--init.weights", "null", "--data.sources", "[{name: vsr, weight: 2e-1}]", "--log.tensorboard", "false"),
        *("--local_rank=1", "--model.decoder.rope.theta", "5e3"),
        *("--parallel.pipeline", "2", "--parallel.layers_per_stage", "[1, 2]"),
    )
    assert (run.train.steps, run.optimizer.lr, run.train.precision) == (100, 1e-3, "bf16")
    assert run.run.dir == Path("2024")
    assert run.init.weights is None
    assert [(s.name, s.weight) for s in run.data.sources] == [("vsr", 0.2)]
    assert run.log.tensorboard is False
    assert run.parallel.layers_per_stage == (1, 2)
    rope = run.model.decoder.rope
    assert (rope.theta, rope.max_position_embeddings) == (5e3, 512)  # its neighbours keep the file's values


def test_an_override_may_mend_a_contradiction_of_the_file(tmp_path: Path) -> None:
    file = edited(tmp_path, {"attention.rule": "mma"}, base=PRETRAIN)
    assert "attention.rule=mma" in message(config=file)
    assert load("--attention.rule", "causal", config=file).attention.rule == "causal"


WORLDS: list[tuple[list[str], int, list[str]]] = [
    ([], 3, ["train.global_batch_size=64", "3 data ranks", "63 or 66", "[1, 2]"]),
    (["--train.global_batch_size", "7"], 2, ["train.global_batch_size=7", "6 or 8", "[1]"]),
]


@pytest.mark.parametrize(("argv", "ranks", "said"), WORLDS)
def test_runs_that_do_not_fit_the_ranks(argv: list[str], ranks: int, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(load(*argv), ranks)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "most", "ranks", "got"), [(64, 32, 2, 32), (64, 32, 4, 16), (16, 32, 8, 2), (64, 24, 1, 16), (7, 4, 1, 1)]
)
def test_micro_batch_is_the_most_that_fits(batch: int, most: int, ranks: int, got: int) -> None:
    run = load("--train.global_batch_size", str(batch), "--train.micro_batch_size", str(most))
    check_world(run, ranks)
    assert micro_batch_size(run, ranks) == got


def test_replicas_that_do_not_fit_the_ranks() -> None:
    split = load("--parallel.tensor", "4", "--parallel.pipeline", "2")
    with pytest.raises(ConfigError, match=r"12 ranks .*parallel\.tensor=4 x parallel\.pipeline=2 = 8.*start 8 or 16"):
        check_world(split, 12)
    with pytest.raises(ConfigError, match=r"^4 ranks .* start 8 ranks"):
        check_world(split, 4)
    check_world(split, 16)


@pytest.mark.parametrize(("ranks", "replicas"), [(8, 1), (16, 2), (64, 8)])
def test_a_replica_counts_as_one_data_rank(ranks: int, replicas: int) -> None:
    spread = load("--parallel.tensor", "4", "--parallel.pipeline", "2")
    alone = load()
    check_world(spread, ranks)
    assert data_size(spread, ranks) == data_size(alone, replicas) == replicas
    assert micro_batch_size(spread, ranks) == micro_batch_size(alone, replicas)


def test_runs_that_fit() -> None:
    for ranks in (1, 2):
        check_world(load(), ranks)
