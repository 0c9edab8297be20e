"""From a configuration to an engine: whatever the layout, the model starts with the same weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.load import load_run
from aki_megatron.config.run import RunConfig
from aki_megatron.engine.global_state import WEIGHT, gather, key
from aki_megatron.errors import CheckpointError
from aki_megatron.model.stage import Stage, build_model
from aki_megatron.train.build import build_engine, load_latest, partition_layers

SFT = Path(__file__).resolve().parents[2] / "configs/demo/sft.yaml"


def demo(*flags: str) -> RunConfig:
    arguments = ["--config", str(SFT), "--model.decoder.num_layers", "4", "--train.precision", "fp32", *flags]
    return load_run(arguments, default_config=SFT, prog="sft.py", description="")


def weights_of(topology, config: RunConfig) -> dict[str, Tensor]:
    """Return the weights of this rank's pipeline stages by their names in the whole model."""
    num_layers: list[int] = []

    def count_layers(stage: Stage) -> None:
        num_layers.append(len(stage.layers))

    engine = build_engine(config, partition_layers(config), topology, init_weights=count_layers)
    assert len(num_layers) == config.parallel.virtual_stages and sum(num_layers) == 4 // topology.pipeline
    prefix = key(WEIGHT, "")
    state = engine.state_dict()
    return {name.removeprefix(prefix): gather(state[name]).clone() for name in state if name.startswith(prefix)}


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
def test_initial_weights_do_not_depend_on_the_layout(run_on, tensor, pipeline, flags):
    config = demo("--parallel.tensor", str(tensor), "--parallel.pipeline", str(pipeline), *flags)
    parts = run_on(4, weights_of, config, tensor=tensor, pipeline=pipeline)
    found = {name: weight for part in parts for name, weight in part.items()}
    model = build_model(config.model, attention=AttentionConfig(rule="mma"), seed=config.train.seed)
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert len(parts[0]) < len(expected) or pipeline == 1


def test_the_newest_complete_checkpoint_is_loaded_though_the_last_save_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wait() -> None:
        raise CheckpointError("the disk is full")

    loaded: list[Path] = []

    def load(checkpoint: Path) -> dict[str, Any]:
        loaded.append(checkpoint)
        return {"step": 4}

    checkpointer: Any = SimpleNamespace(
        folder=Path("runs/x/checkpoints"), wait=wait, latest=lambda: Path("step_000004")
    )
    assert load_latest(checkpointer, load) == {"step": 4} and loaded == [Path("step_000004")]
    assert "the disk is full" in caplog.text
    checkpointer.latest = lambda: None
    with pytest.raises(CheckpointError, match="runs/x/checkpoints has none"):
        load_latest(checkpointer, load)
    assert len(loaded) == 1
