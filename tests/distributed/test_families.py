"""Training of families with parameters that Phi-3 lacks: sharded biases, and norms of the query and key heads."""

from unittest.mock import patch

import pytest
import torch.nn.functional as F
from tiny import Setting, Trained, difference, outcome, reference_training, take_steps, tiny_engine, together
from torch import Tensor

from aki_megatron.model.decoder import HeadNorm
from aki_megatron.parallel.topology import Topology

pytestmark = pytest.mark.distributed
LIMIT = 1e-5
STEPS = range(4)
"""In the fifth step rounding has grown beyond the limit: rates are high, and norms over four features are steep."""

OWN = {"qwen2": ("attention.qkv_proj.bias",), "qwen3": ("attention.q_norm.weight", "attention.k_norm.weight")}
"""Family -> its parameters that Phi-3 does not have."""


def train(topology: Topology, setting: Setting) -> Trained:
    engine = tiny_engine(topology, setting)
    return outcome(engine, take_steps(engine, topology, STEPS))


def train_without_sums(topology: Topology, setting: Setting) -> Trained:
    """Take each tensor rank's part of the gradient of query and key norms for the whole."""

    def forward(self: HeadNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    with patch.object(HeadNorm, "forward", forward):
        return train(topology, setting)


@pytest.mark.parametrize("family", OWN)
def test_training_at_tp2_pp2_equals_one_process(run_on, family):
    setting = Setting(family=family)
    plain = reference_training(STEPS, setting)
    assert difference(together(run_on(4, train, setting, tensor=2, pipeline=2)), plain) <= LIMIT
    for number in range(4):
        for own in OWN[family]:
            weight = plain.weights[f"layers.{number}.{own}"]
            assert (weight - weight.round()).abs().max() > 1e-3, (
                "they start as zeros or ones, and must have been trained"
            )


def test_unsummed_gradients_of_norms_are_noticed(run_on):
    setting = Setting(family="qwen3", zero_stage=0)
    first, second = run_on(2, train_without_sums, setting, tensor=2)
    name = "layers.0.attention.q_norm.weight"
    assert (first.weights[name] - second.weights[name]).abs().max() > 100 * LIMIT, "the copies diverge"


def test_the_families_train_apart():
    """Else equality would prove nothing about what they have of their own."""
    losses = [reference_training(range(2), Setting(family=family)).losses[1] for family in ("llama", *OWN)]
    assert min(abs(losses[0] - losses[1]), abs(losses[0] - losses[2])) > 100 * LIMIT
