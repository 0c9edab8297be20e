"""What DeepSpeed is told, and what is refused before it is asked."""

import pytest
import torch
from torch import nn

from aki_megatron.engine import zero
from aki_megatron.engine.optimizer import adamw
from aki_megatron.engine.settings import deepspeed_settings
from aki_megatron.engine.zero import ZeroEngine
from aki_megatron.flow import ConfigError


def settings(**user):
    return deepspeed_settings(user, zero_stage=3, precision="bf16", ranks=2)


def test_the_run_decides_over_the_file_and_the_file_over_defaults():
    found = settings(
        gradient_clipping=1.0,
        train_batch_size=512,
        communication_data_type="bf16",
        zero_optimization={"stage": 1, "reduce_bucket_size": 7, "memory_efficient_linear": True},
    )
    assert found["gradient_clipping"] == 0.0 and found["train_batch_size"] == 2
    assert found["communication_data_type"] == "bf16"
    assert found["zero_optimization"]["reduce_bucket_size"] == 7
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["memory_efficient_linear"] is False


def test_bf16_keeps_fp32_gradients():
    found = settings()
    assert found["bf16"]["enabled"] and found["data_types"]["grad_accum_dtype"] == "fp32"
    assert found["communication_data_type"] == "fp32"


@pytest.mark.parametrize("name", ["offload_optimizer", "offload_param"])
def test_offloading_is_refused(name):
    assert settings(zero_optimization={name: {"device": "none"}})
    with pytest.raises(ConfigError, match=f"zero_optimization.{name}=.*not supported.*Remove {name}"):
        settings(zero_optimization={name: {"device": "cpu"}})


def test_a_version_that_is_not_proven_is_refused(monkeypatch):
    monkeypatch.setattr(zero, "version", lambda _: "0.99.0")
    with pytest.raises(ConfigError, match="deepspeed 0.99.0 is installed; the engine is proven with 0.19.8.*==0.19.8"):
        zero._deepspeed()


class WithBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("angles", torch.tensor([1 / 3]))


def precision_of_buffer_and_weights(topology) -> tuple[float, torch.dtype, float]:
    torch.manual_seed(0)
    model = WithBuffer()
    before = model.layer.weight.detach().clone()
    optimizer = adamw(model, weight_decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8)
    engine = ZeroEngine(model, topology, optimizer, zero_stage=1, precision="bf16", clip_norm=1.0, deepspeed_config={})
    lost = (dict(engine.weights())["layer.weight"] - before).abs().max()
    return model.angles.item(), model.layer.weight.dtype, float(lost)


@pytest.mark.distributed
def test_bf16_rounds_neither_buffers_nor_master_weights(run_on):
    buffer, dtype, lost = run_on(1, precision_of_buffer_and_weights)[0]
    assert buffer == torch.tensor(1 / 3).item()
    assert dtype == torch.bfloat16
    assert lost == 0.0
