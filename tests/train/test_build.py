"""From a configuration to an engine: however the model is spread, it starts with the weights of the whole one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import build_model
from aki_megatron.train.build import build_engine, cut_model, rollback

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"


def demo(*flags: str) -> RunConfig:
    words = ["--config", str(SFT), "--model.decoder.num_layers", "4", "--train.precision", "fp32", *flags]
    return load_run(words, default_config=SFT, prog="sft.py", description="")


def weights_of(topology, config: RunConfig) -> dict[str, Tensor]:
    """This rank's weights, each once, and the rows of its stages."""
    filled: list[int] = []
    engine = build_engine(config, cut_model(config), topology, fill=lambda stage: filled.append(len(stage.blocks)))
    assert len(filled) == config.parallel.virtual_stages and sum(filled) == 4 // topology.pipeline
    return {name: weight.clone() for name, weight in engine.weights()}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tensor", "pipeline", "flags"),
    [
        (1, 1, ("--parallel.zero_stage", "0")),
        (2, 2, ("--parallel.zero_stage", "0")),
        (2, 1, ("--parallel.zero_stage", "1", "--parallel.recompute", "full")),
        (1, 2, ("--parallel.virtual_stages", "2", "--parallel.zero_stage", "3")),
        (1, 2, ("--parallel.layers_per_stage", "[2, 2]", "--parallel.zero_stage", "2")),
    ],
)
def test_a_spread_model_starts_as_the_whole_one(run_on, tensor, pipeline, flags):
    config = demo("--parallel.tensor", str(tensor), "--parallel.pipeline", str(pipeline), *flags)
    shares = run_on(4, weights_of, config, tensor=tensor, pipeline=pipeline)
    found = {name: weight for share in shares for name, weight in share.items()}
    expected = dict(build_model(config.model, rule="mma", seed=config.train.seed).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(shares[0]) < len(expected) or pipeline == 1


def test_a_run_goes_back_to_the_newest_whole_checkpoint_though_the_last_save_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wait() -> None:
        raise CheckpointError("the disk is full")

    loaded: list[Any] = []
    engine: Any = SimpleNamespace(state=dict, load_state=loaded.append)
    saver: Any = SimpleNamespace(
        folder=Path("runs/x/checkpoints"),
        wait=wait,
        latest=lambda: Path("step_000004"),
        load=lambda path, tensors: path,
    )
    assert rollback(engine, saver) == Path("step_000004") and loaded == [{}]
    assert "the disk is full" in caplog.text
    saver.latest = lambda: None
    with pytest.raises(CheckpointError, match="runs/x/checkpoints has none"):
        rollback(engine, saver)
    assert len(loaded) == 1
