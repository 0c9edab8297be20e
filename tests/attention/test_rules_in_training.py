"""Every rule trains through the engine, its checkpoint reloads, and every pipeline and tensor rank follows the rule."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rule_runs import RUNS, config_of, prompts, training_batch
from torch import Tensor

from aki_megatron.checkpoint.initial_weights import load_weights
from aki_megatron.config.run import RunConfig
from aki_megatron.config.save import load_saved
from aki_megatron.engine.base import Engine
from aki_megatron.evaluate.generate import generate
from aki_megatron.model.stage import build_model
from aki_megatron.parallel.topology import Topology
from aki_megatron.train.build import build_checkpointer, build_engine, partition_layers

pytestmark = pytest.mark.distributed
STEPS = 3


def build(topology: Topology, config: RunConfig) -> Engine:
    return build_engine(config, partition_layers(config), topology, init_weights=lambda stage: None)


def losses_of(engine: Engine, topology: Topology, num_steps: int, lr: float = 1e-2) -> list[float]:
    """Losses of optimizer steps on the same two micro-batches."""
    batches = [training_batch(0), training_batch(5)] if topology.reads_data else []
    return [engine.train_step(batches, lr=lr).loss for _ in range(num_steps)]


def train(topology: Topology, config: RunConfig) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of some steps, and this rank's weights after them."""
    engine = build(topology, config)
    losses = losses_of(engine, topology, STEPS, lr=1e-3)
    return losses, {name: weight.clone() for name, weight in engine.named_weights()}


def train_save_and_load(topology: Topology, config: RunConfig) -> dict[str, Any]:
    """Train, save, resume from the checkpoint in a new engine, and generate with the saved weights."""
    config.run.dir.mkdir(parents=True)
    engine, checkpointer = build(topology, config), build_checkpointer(config, topology)
    before = losses_of(engine, topology, STEPS)
    checkpointer.save(STEPS, engine.state_dict(), {"step": STEPS})
    checkpointer.wait()
    after = losses_of(engine, topology, 2)
    checkpoint = checkpointer.latest()
    assert checkpoint is not None
    resumed = build(topology, config)
    tensors = resumed.state_dict()
    extra = checkpointer.load(checkpoint, tensors)
    resumed.load_state_dict(tensors)
    saved = load_saved(checkpoint / "config.yaml")
    model = build_model(saved.model, attention=saved.attention)
    load_weights(model, checkpoint)
    return {
        "losses": before,
        "step": extra["step"],
        "after": (after, losses_of(resumed, topology, 2)),
        "attention": saved.attention,
        "generated": generate(model.eval(), prompts(3), stop_ids=(), max_new_tokens=4),
    }


@pytest.mark.parametrize("name", RUNS)
def test_a_rule_trains_and_its_checkpoint_resumes_and_generates(run_on: Any, name: str, tmp_path: Path) -> None:
    config = config_of(name, "--run.dir", str(tmp_path / "run"))
    (result,) = run_on(1, train_save_and_load, config)
    assert result["losses"][-1] < result["losses"][0]
    assert result["step"] == STEPS
    assert result["after"][0] == result["after"][1]
    assert result["attention"] == config.attention
    assert [len(tokens) for tokens in result["generated"]] == [4, 4, 4]


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("causal", "mma", "half of mma")])
def test_pipeline_and_tensor_ranks_follow_the_rule(run_on: Any, name: str) -> None:
    ((losses, weights),) = run_on(1, train, config_of(name))
    spread = config_of(
        name, "--parallel.pipeline", "2", "--parallel.tensor", "2", "--parallel.mask_check_interval", "1"
    )
    parts = run_on(4, train, spread, tensor=2, pipeline=2)
    for other_losses, own in parts:
        assert other_losses == pytest.approx(losses, rel=1e-5)
        for key, weight in own.items():
            torch.testing.assert_close(weight, weights[key], rtol=0, atol=2e-5)
    ((causal, _),) = run_on(1, train, config_of("causal"))
    assert max(abs(a - b) for a, b in zip(causal, losses, strict=True)) > 1e-4
