"""Parameter groups, the learning-rate schedule of the official release, gradient norm and clipping."""

import pytest
import torch
from torch import nn

from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import DecoderConfig, ModelConfig, ResamplerConfig, RopeConfig, VisionConfig
from aki_megatron.config.run import OptimizerConfig
from aki_megatron.engine.norm import clip_factor, squared_norm
from aki_megatron.engine.optimizer import adamw, learning_rate, parameter_groups
from aki_megatron.model.sharding import shard_spec
from aki_megatron.model.stage import build_model, build_stage

SFT = {"lr": 2e-5, "min_lr": 1e-6, "warmup_steps": 150, "steps": 10_000}


@pytest.mark.parametrize(("step", "rate"), [(0, 1e-6), (75, 1.05e-5), (150, 2e-5), (5075, 1.05e-5), (10_000, 1e-6)])
def test_fine_tuning_schedule(step, rate):
    assert learning_rate(step, **SFT) == pytest.approx(rate, rel=1e-9)


def test_schedule_stays_at_the_minimum_past_the_end():
    assert learning_rate(12_000, **SFT) == SFT["min_lr"]


def test_schedule_without_warmup_starts_at_the_maximum():
    assert learning_rate(0, lr=1.0, min_lr=0.1, warmup_steps=0, steps=10) == 1.0
    help_texts = {name: info.description for name, info in OptimizerConfig.model_fields.items()}
    assert "0: the first step has lr" in help_texts["warmup_steps"]
    assert "first" not in help_texts["min_lr"]


def test_a_longer_run_goes_on_at_the_rate_of_the_longer_curve():
    longer = SFT | {"steps": 12_000}
    assert learning_rate(10_000, **longer) > SFT["min_lr"] == learning_rate(10_000, **SFT)
    assert learning_rate(12_000, **longer) == SFT["min_lr"]


def model_config(**decoder):
    return ModelConfig(
        vision=VisionConfig(
            image_size=8, patch_size=4, hidden_size=12, num_layers=1, num_heads=2, intermediate_size=20
        ),
        resampler=ResamplerConfig(num_latents=3, num_layers=1, num_heads=2, head_dim=6, mlp_ratio=2),
        decoder=DecoderConfig(
            **{
                "hidden_size": 24,
                "num_layers": 3,
                "num_heads": 4,
                "num_kv_heads": 2,
                "intermediate_size": 20,
                "padded_vocab_size": 40,
            }
            | {"vocab_size": 33, "num_added_tokens": 2, "rope": RopeConfig(rope_type="default"), "lm_head_bias": False}
            | decoder
        ),
    )


def names_of(stage, group):
    named = {id(parameter): name for name, parameter in stage.named_parameters()}
    return {named[id(parameter)] for parameter in group["params"]}


TABLES = {"input_embedder.token_embedding.base.weight", "input_embedder.token_embedding.added_tokens"}


def test_all_but_the_embedding_tables_decay():
    model = build_model(model_config(), attention=AttentionConfig(rule="mma"))
    groups = parameter_groups(model, 0.1)
    kept = [group for group in groups if group["weight_decay"] == 0.0]
    assert set.union(*(names_of(model, group) for group in kept)) == TABLES
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(name for group in groups for name in names_of(model, group)) == sorted(trained)


def test_parameters_of_a_group_agree_on_sharding():
    model = build_model(model_config(), attention=AttentionConfig(rule="mma"))
    for group in parameter_groups(model, 0.1):
        assert {shard_spec(name, model.config.decoder) is not None for name in names_of(model, group)} == {
            group["tensor_sharded"]
        }
        assert not group["tied"]


def test_tied_tables_have_the_same_separate_groups_on_the_first_and_the_last_stage():
    config = model_config(tie_word_embeddings=True)
    first, last = (
        build_stage(config, [0], attention=AttentionConfig(rule="mma")),
        build_stage(config, [2], attention=AttentionConfig(rule="mma")),
    )
    tied = [[group for group in parameter_groups(stage, 0.1) if group["tied"]] for stage in (first, last)]
    assert [[tuple(p.shape for p in group["params"]) for group in groups] for groups in tied] == [
        [((2, 24),), ((40, 24),)]
    ] * 2
    assert all(group["weight_decay"] == 0.0 for groups in tied for group in groups)
    assert set.union(*(names_of(first, group) for group in tied[0])) == TABLES
    assert not any(
        group["tied"]
        for group in parameter_groups(build_stage(config, [1], attention=AttentionConfig(rule="mma")), 0.1)
    )


def test_empty_groups_are_left_out():
    middle = build_stage(model_config(), [1], attention=AttentionConfig(rule="mma"))
    assert len(adamw(middle, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8).param_groups) == 2


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
