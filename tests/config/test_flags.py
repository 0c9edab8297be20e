"""Wrong flags, and flags that win over the file."""

from pathlib import Path

import pytest
from demo_runs import PRETRAIN, edited, load, message

from aki_megatron.config.field_info import metavar
from aki_megatron.config.flags import repeated_flags
from aki_megatron.config.load import FLAGS

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
    (["--config", "none.yaml"], ["--config is given twice; keep one of them"]),
    (["--ds_config", "a.json", "--deepspeed-config=b.json"], ["--deepspeed-config is given twice"]),
    (["--train.steps", "3.0"], ["train.steps must be a whole number > 0; got 3.0; write 3."]),
    (["--train.steps", "true"], ["train.steps must be a whole number > 0; got true."]),
    (["--parallel.zero_stage", "true"], ["parallel.zero_stage must be one of 0, 1, 2, 3; got true."]),
    (["--parallel.zero_stage", "1.0"], ["parallel.zero_stage must be one of 0, 1, 2, 3; got 1.0."]),
    (["--optimizer.lr", "true"], ["optimizer.lr must be a number > 0; got true."]),
    (["--train.steps", "9" * 30], ["train.steps must be at most 2,147,483,647; got 9999"]),
    (["--train.steps", "9" * 5000], ["--train.steps: the value cannot be read: "]),
    (["--train.global_batch_size", str(10**10)], ["train.global_batch_size must be at most 1,048,576; got 10000"]),
    (["--data.num_workers", "100000"], ["data.num_workers must be at most 1,024; got 100000."]),
    (["--watch.step_timeout", "1e300"], ["watch.step_timeout must be at most 1,000,000,000; got 1e+300."]),
    (["--data.cache_gigabytes", "1e300"], ["data.cache_gigabytes must be at most 1,000,000,000"]),
    (["--run.dir", ""], ["run.dir must be a path; got null."]),
    (["--run.dir="], ["run.dir must be a path; got null."]),
    (["--run.dir", "null"], ["run.dir must be a path; got null."]),
    (["--run.dir", "  "], ['run.dir must be a path; got "  ".']),
    (["--data.root", ""], ["data.root must be a path; got null."]),
    (["--data.sources", "[" * 50 + "]" * 50], ["--data.sources: its values are nested more than 32 levels deep."]),
    (["--data.sources", "[" * 5000 + "]" * 5000], ["--data.sources: its values are nested too deeply to be read."]),
    (["--allow_change", ""], ["--allow_change needs keys, such as --allow_change train.steps"]),
    (["--allow_change", "train.step"], ["--allow_change train.step: there is no such key; did you mean train.steps?"]),
    (["--allow_change", "model.decoder.num_layers"], ["--allow_change model.decoder.num_layers: what the checkpoint "]),
    (["--allow_change", "train"], ["--allow_change train: ", "Keys that can change: train.steps, optimizer, "]),
]


@pytest.mark.parametrize(("argv", "expected"), OVERRIDE_MISTAKES, ids=[" ".join(a) for a, _ in OVERRIDE_MISTAKES])
def test_mistakes_in_flags(argv: list[str], expected: list[str]) -> None:
    text = message(*argv)
    for part in expected:
        assert part in text, text
    assert "\n" not in text


def test_the_last_of_a_flag_counts_and_it_is_said() -> None:
    argv = ["--train.steps", "500", "--train.seed=4", "--train.steps=600", "--train.seed", "4"]
    assert load(*argv).train.steps == 600
    assert repeated_flags(argv) == ['--train.steps is given 2 times; the last one counts: "600"']


def test_a_missing_file() -> None:
    assert message(config=Path("none.yaml")).startswith("none.yaml: there is no such file")


def test_no_number_is_true_and_every_path_has_a_name() -> None:
    for key, info in FLAGS.items():
        if metavar(info) in ("INT", "NUMBER", "PATH"):
            assert f"{key} must be" in message(f"--{key}", "true" if metavar(info) != "PATH" else " "), key


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
