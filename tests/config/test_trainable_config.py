"""The table of what trains: values, phases, and every refusal."""

from pathlib import Path

import pytest
from demo_runs import SFT

from aki_megatron.config.changes import check_changeable, check_progress
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import check_resume, dump_run
from aki_megatron.config.trainable import DEFAULT_PLAN
from aki_megatron.errors import ConfigError
from aki_megatron.train.run_summary import summary_lines, trained_text


def load(*flags: str) -> RunConfig:
    return load_run(["--config", str(SFT), *flags], default_config=SFT, prog="sft.py", description="A.")


def phases(text: str, steps: int, *flags: str) -> RunConfig:
    return load("--data.phases", text, "--train.steps", str(steps), "--optimizer.warmup_steps", "1", *flags)


def modes(run: RunConfig, phase: int) -> dict[str, tuple[str, int]]:
    return {name: (part.mode, part.since) for name, part in run.training_plans()[phase].parts.items()}


def test_by_default_all_but_the_encoder_train() -> None:
    (plan,) = load().training_plans()
    assert plan == DEFAULT_PLAN and plan.lora is None and plan.update_counters == (0,)
    assert {name for name, part in plan.parts.items() if part.mode == "frozen"} == {"vision"}
    assert trained_text(load(), 0).endswith("frozen: vision")


def test_a_part_that_begins_in_a_phase_counts_from_there() -> None:
    run = phases(
        "[{steps: 2, trainable: {decoder: frozen, embeddings: frozen, head: frozen}}, {steps: 3}, "
        "{steps: 4, trainable: {resampler: frozen}}, {steps: 5}]",
        14,
    )
    assert modes(run, 0)["decoder"] == ("frozen", 0) and modes(run, 0)["resampler"] == ("full", 0)
    assert modes(run, 1)["decoder"] == ("full", 1) and modes(run, 1)["resampler"] == ("full", 0)
    assert modes(run, 3)["decoder"] == ("full", 1) and modes(run, 3)["resampler"] == ("full", 3)
    assert [plan.update_counters for plan in run.training_plans()] == [(0,), (0, 1), (0, 1), (0, 1, 3)]
    assert [run.training_phase(step) for step in (0, 1, 2, 4, 5, 8, 9, 13, 99)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    lines = list(summary_lines(run, [range(run.model.decoder.num_layers)], world_size=1))
    assert any(line.startswith("phase 2, from step 3: ") for line in lines)


def test_adapters_are_there_in_every_phase() -> None:
    run = phases("[{steps: 2, trainable: {decoder: frozen}}, {steps: 3}]", 5, "--trainable.decoder.mode", "lora")
    assert all(plan.lora is not None and plan.lora.rank == 16 for plan in run.training_plans())
    assert "decoder lora rank 16" in trained_text(run, 1) and "frozen: vision, decoder" in trained_text(run, 0)


FROZEN = [f"--trainable.{name}.mode=frozen" for name in ("resampler", "embeddings", "decoder", "head")]
TWO = "[{steps: 2, trainable: {decoder: %s}}, {steps: 3, trainable: {decoder: %s}}]"
REFUSED: list[tuple[list[str], str]] = [
    (["--trainable.vision.mode", "lora"], "trainable.vision.mode must be one of frozen, full"),
    (["--trainable.head.lr_factor", "0"], "trainable.head.lr_factor must be a number > 0"),
    (["--trainable.vision.lr_factor", "0.1"], "trainable.vision has lr_factor=0.1 .* but mode=frozen"),
    (FROZEN, "trainable trains nothing: every part is frozen"),
    (["--trainable.lora.dropout", "0.1"], "trainable.lora.dropout=0.1 is not supported"),
    (["--trainable.lora.targets", "[query]"], "trainable.lora.targets names query; choose from qkv_proj"),
    (["--trainable.lora.targets", "[qkv_proj, q_proj]"], "names qkv_proj and q_proj, which it contains"),
    (["--trainable.lora.targets", "[q_proj, q_proj]"], "names q_proj twice"),
    (
        ["--data.phases", TWO % ("lora", "full"), "--train.steps", "5", "--optimizer.warmup_steps", "1"],
        "lora in one phase and full in another",
    ),
    (
        ["--data.phases", "[{steps: 2, trainable: {visio: full}}]"],
        "unknown key data.phases.0..trainable.visio;",
    ),
    (
        ["--data.phases", "[{steps: 2, trainable: {vision: ful}}]"],
        "data.phases.0..trainable.vision.mode must be",
    ),
    (
        [
            *("--model.decoder.tie_word_embeddings", "true", "--model.decoder.lm_head_bias", "false"),
            *("--trainable.head.mode", "frozen"),
        ],
        "trainable.embeddings and trainable.head differ",
    ),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_what_cannot_train_is_refused(flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(*flags)


def test_another_table_is_refused_and_explained(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_run(load()))
    assert check_resume(tmp_path / "config.yaml", load()) == []
    with pytest.raises(ConfigError, match='trainable.decoder.mode was "full".*"lora" now[^$]*data.phases to the next'):
        check_resume(tmp_path / "config.yaml", load("--trainable.decoder.mode", "lora"))


def test_a_run_that_goes_on_keeps_its_table() -> None:
    with pytest.raises(ConfigError, match="--allow_change trainable: .* let a later phase train otherwise"):
        check_changeable(["trainable"])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("[{steps: 2, trainable: {head: frozen}}, {steps: 3}]", r"data.phases\[0\] cannot be changed"),
        ("[{steps: 2}, {steps: 3, trainable: {decoder: lora}}]", "one phase and full in another"),
        ("[{steps: 2, trainable: {decoder: frozen}}, {steps: 3}]", r"data.phases\[0\] cannot be changed"),
        ("[{steps: 2}, {steps: 3, trainable: {vision: full}}]", ""),
    ],
)
def test_only_later_phases_change(changed: str, said: str) -> None:
    def check() -> None:
        check_progress(phases("[{steps: 2}, {steps: 3}]", 5), phases(changed, 5), step=2, data_step=2)

    if said:
        with pytest.raises(ConfigError, match=said):
            check()
    else:
        check()


def test_adapters_do_not_appear_in_a_run_that_goes_on() -> None:
    frozen = "[{steps: 2, trainable: {decoder: frozen}}, {steps: 3, trainable: {decoder: %s}}]"
    with pytest.raises(ConfigError, match="get or lose low-rank adapters"):
        check_progress(phases(frozen % "frozen", 5), phases(frozen % "lora", 5), step=1, data_step=1)
