"""Wrong flags, and flags that win over the file."""

from pathlib import Path

import pytest
from demo_runs import PRETRAIN, edited, load, message

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


@pytest.mark.parametrize(("argv", "expected"), OVERRIDE_MISTAKES, ids=[" ".join(a) for a, _ in OVERRIDE_MISTAKES])
def test_mistakes_in_flags(argv: list[str], expected: list[str]) -> None:
    text = message(*argv)
    for part in expected:
        assert part in text, text


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


def test_a_flag_may_resolve_a_contradiction_of_the_file(tmp_path: Path) -> None:
    file = edited(tmp_path, {"attention.rule": "mma"}, base=PRETRAIN)
    assert "attention.rule=mma" in message(config=file)
    assert load("--attention.rule", "causal", config=file).attention.rule == "causal"
