"""Parameter groups and the learning-rate curve of the papers' code."""

import pytest
import torch
from torch import nn

from aki_megatron.engine.norm import clip_factor, squared_norm
from aki_megatron.engine.optimizer import adamw, learning_rate, parameter_groups

SFT = {"lr": 2e-5, "min_lr": 1e-6, "warmup_steps": 150, "steps": 10_000}


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-6), (75, 1.05e-5), (150, 2e-5), (5075, 1.05e-5), (10_000, 1e-6)])
def test_fine_tuning_curve(step, rate):
    assert learning_rate(step, **SFT) == pytest.approx(rate, rel=1e-9)


def test_curve_stays_at_the_minimum_past_the_end():
    assert learning_rate(12_000, **SFT) == SFT["min_lr"]


def test_curve_without_warmup_starts_at_the_top():
    assert learning_rate(0, lr=1.0, min_lr=0.1, warmup_steps=0, steps=10) == 1.0


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(2, 2).requires_grad_(False)
        self.embedding = nn.ModuleDict({"table": nn.Embedding(3, 2), "extra_rows": nn.Embedding(2, 2)})
        self.norm = nn.LayerNorm(2)
        self.head = nn.Linear(2, 3)


def test_all_but_the_embedding_tables_decay():
    model = Model()
    decayed, kept = parameter_groups(model, 0.1)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [named[id(p)] for p in decayed["params"]] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert [named[id(p)] for p in kept["params"]] == ["embedding.table.weight", "embedding.extra_rows.weight"]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_a_model_without_trainable_tables_has_one_group():
    model = Model()
    model.embedding.requires_grad_(False)
    assert len(adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8).param_groups) == 1


def test_norm_and_clipping_equal_torch():
    gradients = [torch.randn(5, 7), torch.randn(3), torch.randn(1)]
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    want = float(nn.utils.clip_grad_norm_(parameters, 0.5))
    norm = float(squared_norm(gradients, torch.device("cpu")).sqrt())
    assert norm == pytest.approx(want, rel=1e-6)
    torch.testing.assert_close(gradients[0] * clip_factor(norm, 0.5), parameters[0].grad)
    assert clip_factor(0.1, 0.5) == 1.0


def test_norm_of_huge_gradients_does_not_overflow():
    assert float(squared_norm([torch.full((4,), 1e30)], torch.device("cpu"))) == pytest.approx(4e60)
