"""What rank 0 says of a run: sizes of the whole model, the cut, the step, the bubble and the way out of it."""

from pathlib import Path

import pytest

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.model.stage import build_model
from aki_megatron.train.build import cut_model
from aki_megatron.train.run_summary import describe

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"


def demo(*flags: str) -> RunConfig:
    words = ["--config", str(SFT), "--model.decoder.num_layers", "4", "--train.precision", "fp32", *flags]
    return load_run(words, default_config=SFT, prog="sft.py", description="")


def lines(config: RunConfig, ranks: int) -> list[str]:
    return list(describe(config, cut_model(config), world_size=ranks))


def test_one_process_has_no_cut_and_no_bubble():
    said = lines(demo("--train.global_batch_size", "64", "--train.micro_batch_size", "32"), 1)
    assert len(said) == 2
    assert said[1] == (
        "step: 64 samples = 1 data rank x 2 micro-batches x 32; tensor 1 x pipeline 1, ZeRO-3, fp32, rule mma"
    )


def test_the_model_is_described_whole_however_it_is_cut():
    whole = lines(demo(), 1)[0]
    elements = sum(parameter.numel() for parameter in build_model(demo().model, rule="mma").parameters())
    assert whole.startswith(f"model: {elements:,} parameters, ")
    assert lines(demo("--parallel.tensor", "2", "--parallel.pipeline", "2"), 8)[0] == whole


def test_the_cut_and_its_share_of_the_cost():
    config = demo(
        "--parallel.pipeline", "2", "--parallel.layers_per_stage", "[1, 3]", "--train.global_batch_size", "64"
    )
    (cut,) = [line for line in lines(config, 2) if line.startswith("cut:")]
    front, back = cut.removeprefix("cut: ").removesuffix(" layers; in brackets the share of the arithmetic").split("|")
    assert front.startswith("front + 1 (") and back.strip().startswith("3 + head (")
    shares = [int(part.split("(")[1].split("%")[0]) for part in (front, back)]
    assert sum(shares) == 100 and shares[0] < shares[1]


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
    said = lines(config, 4)
    assert idle in said[3]
    assert len(said) == (5 if hint else 4) and (hint or "") in said[-1]


def test_chunks_are_named():
    config = demo("--parallel.pipeline", "2", "--parallel.virtual_stages", "2", "--train.global_batch_size", "64")
    said = lines(config, 2)
    assert "tensor 1 x pipeline 2 (x 2 chunks)" in said[1]
    assert said[2].count("|") == 3
