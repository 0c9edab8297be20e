"""ZeRO 1, 2 and 3 over 1, 2 and 4 ranks equal a plain training loop."""

import pytest
import torch
from tiny import CLIP_NORM, OPTIMIZER, Trained, draw_share, rates, stand_in, train_plainly

from aki_megatron.engine.optimizer import adamw
from aki_megatron.engine.zero import ZeroEngine
from aki_megatron.parallel.topology import Topology

pytestmark = pytest.mark.distributed


def build_engine(topology, model, zero_stage, precision="fp32", **deepspeed_config):
    return ZeroEngine(
        model,
        topology,
        adamw(model, **OPTIMIZER),
        zero_stage=zero_stage,
        precision=precision,
        clip_norm=CLIP_NORM,
        deepspeed_config=deepspeed_config,
    )


def train(topology: Topology, zero_stage: int, precision: str) -> Trained:
    engine = build_engine(topology, stand_in(), zero_stage, precision)
    reports = [engine.train_step(draw_share(step, topology.data_rank, topology.data), lr) for step, lr in rates()]
    weights = {name: weight.clone() for name, weight in engine.weights()}
    return Trained([r.loss for r in reports], [r.grad_norm for r in reports], weights)


def difference(got: Trained, want: Trained) -> float:
    assert got.weights.keys() == want.weights.keys()
    weights = max((got.weights[name] - want.weights[name]).abs().max().item() for name in want.weights)
    losses = max(abs(a - b) for a, b in zip(got.losses, want.losses, strict=True))
    norms = max(abs(a - b) for a, b in zip(got.norms, want.norms, strict=True))
    print(weights, losses, norms)
    return max(weights, losses, norms)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_equals_the_plain_loop(run_on, zero_stage, ranks):
    plain = train_plainly(stand_in)
    for got in run_on(ranks, train, zero_stage, "fp32"):
        assert difference(got, plain) <= 1e-5


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bf16(run_on, zero_stage):
    plain = train_plainly(stand_in)
    for got in run_on(2, train, zero_stage, "bf16"):
        assert difference(got, plain) <= 1e-1
