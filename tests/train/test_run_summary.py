"""The summary of a run: sizes of the whole model, the step, the pipeline stages, the bubble and hints."""

from pathlib import Path

import pytest

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.model.stage import build_model
from aki_megatron.train.build import partition_layers
from aki_megatron.train.run_summary import summary_lines

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"


def demo(*flags: str) -> RunConfig:
    arguments = ["--config", str(SFT), "--model.decoder.num_layers", "4", "--train.precision", "fp32", *flags]
    return load_run(arguments, default_config=SFT, prog="sft.py", description="")


def lines(config: RunConfig, ranks: int) -> list[str]:
    return list(summary_lines(config, partition_layers(config), world_size=ranks))


def test_one_process_has_no_stages_and_no_bubble():
    printed = lines(demo("--train.global_batch_size", "64", "--train.micro_batch_size", "32"), 1)
    assert len(printed) == 2
    assert printed[1] == (
        "step: 64 samples = 1 data rank x 2 micro-batches x 32; tensor 1 x pipeline 1, ZeRO-3, fp32, rule mma"
    )


def test_the_model_size_does_not_depend_on_the_layout():
    expected = lines(demo(), 1)[0]
    elements = sum(
        parameter.numel() for parameter in build_model(demo().model, attention=AttentionConfig(rule="mma")).parameters()
    )
    assert expected.startswith(f"model: {elements:,} parameters, ")
    assert lines(demo("--parallel.tensor", "2", "--parallel.pipeline", "2"), 8)[0] == expected


def test_the_stages_and_their_fractions_of_the_flops():
    config = demo(
        "--parallel.pipeline", "2", "--parallel.layers_per_stage", "[1, 3]", "--train.global_batch_size", "64"
    )
    (line,) = [line for line in lines(config, 2) if line.startswith("stages:")]
    first, last = (
        line.removeprefix("stages: ").removesuffix(" layers; in parentheses the fraction of the FLOPs").split("|")
    )
    assert first.startswith("input embedder + 1 (") and last.strip().startswith("3 + LM head (")
    fractions = [int(part.split("(")[1].split("%")[0]) for part in (first, last)]
    assert sum(fractions) == 100 and fractions[0] < fractions[1]


@pytest.mark.parametrize(
    ("batch", "micro", "idle", "hint"),
    [
        ("64", "4", "each is idle 16% of the time", None),  # 16 micro-batches: 3 / 19
        ("64", "32", "each is idle 60% of the time", "--train.micro_batch_size 16 gives 4 micro-batches"),  # 2: 3 / 5
        ("2", "1", "each is idle 60% of the time", "larger train.global_batch_size"),
    ],
)
def test_the_bubble_and_a_hint(batch, micro, idle, hint):
    config = demo("--parallel.pipeline", "4", "--train.global_batch_size", batch, "--train.micro_batch_size", micro)
    printed = lines(config, 4)
    assert idle in printed[3]
    assert len(printed) == (5 if hint else 4) and (hint or "") in printed[-1]


def test_virtual_stages_are_named():
    config = demo("--parallel.pipeline", "2", "--parallel.virtual_stages", "2", "--train.global_batch_size", "64")
    printed = lines(config, 2)
    assert "tensor 1 x pipeline 2 (x 2 virtual stages)" in printed[1]
    assert printed[2].count("|") == 3
