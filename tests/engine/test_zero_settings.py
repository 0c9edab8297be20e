"""DeepSpeed's settings, and what is refused before it is called."""

import pytest

from aki_megatron.engine import zero_stage
from aki_megatron.engine.settings import deepspeed_settings
from aki_megatron.engine.zero_state import build_zero_state
from aki_megatron.errors import ConfigError


def settings(**user):
    return deepspeed_settings(user, zero_stage=3, precision="bf16", num_ranks=2)


def test_the_run_decides_over_the_file():
    found = settings(
        gradient_clipping=1.0,
        train_batch_size=512,
        communication_data_type="bf16",
        zero_optimization={"stage": 1, "reduce_bucket_size": 7, "memory_efficient_linear": True},
    )
    assert found["gradient_clipping"] == 0.0 and found["train_batch_size"] == 2
    assert found["communication_data_type"] == "fp32"
    assert found["zero_optimization"]["reduce_bucket_size"] == 7
    assert found["zero_optimization"]["stage"] == 3
    assert found["zero_optimization"]["memory_efficient_linear"] is False


def test_bf16_keeps_fp32_gradients():
    found = settings()
    assert found["bf16"]["enabled"] and found["data_types"]["grad_accum_dtype"] == "fp32"
    assert found["communication_data_type"] == "fp32"


def test_state_in_host_memory_is_updated_by_torch():
    found = settings(zero_optimization={"offload_optimizer": {"device": "cpu", "pin_memory": False}})
    assert found["zero_force_ds_cpu_optimizer"] is False
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert "zero_force_ds_cpu_optimizer" not in settings(zero_optimization={"offload_optimizer": {"device": "none"}})


def test_the_norm_that_offloading_needs_stays_on():
    offload = {"offload_optimizer": {"device": "cpu"}}
    for user, wanted in ((offload, None), ({}, False)):
        found = deepspeed_settings({"zero_optimization": user}, zero_stage=2, precision="fp32", num_ranks=1)
        assert found["zero_optimization"].get("compute_grad_norm") is wanted


@pytest.mark.parametrize(
    ("zero_stage", "section", "message"),
    [
        (3, {"offload_param": {"device": "cpu"}}, "offload_param=.*not supported.*Remove offload_param"),
        (3, {"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device=nvme.*Set it to cpu, or to none"),
        (1, {"offload_optimizer": {"device": "cpu"}}, "needs ZeRO 2 or 3.*zero_stage=1.*Set parallel.zero_stage to 2"),
        (3, {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "offload_optimizer.ratio=0.5.*Remove ratio"),
        (
            3,
            {"offload_optimizer": {"device": "cpu", "super_offload": True}},
            "super_offload=True.*Remove super_offload",
        ),
    ],
)
def test_other_offloading_is_refused(zero_stage, section, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_settings({"zero_optimization": section}, zero_stage=zero_stage, precision="bf16", num_ranks=1)


def test_a_version_that_is_not_tested_is_refused(monkeypatch):
    monkeypatch.setattr(zero_stage, "version", lambda _: "0.99.0")
    with pytest.raises(ConfigError, match="deepspeed 0.99.0 is installed; the engine is tested with 0.19.8.*==0.19.8"):
        zero_stage._deepspeed()


class SomeOptimizer:
    """An optimizer class that is not tested."""


def test_an_optimizer_of_deepspeeds_that_is_not_tested_is_refused():
    with pytest.raises(ConfigError, match="its optimizer SomeOptimizer; tested are BF16_Optimizer, DeepSpeedZeroOpt"):
        build_zero_state(SomeOptimizer(), [])
