"""Settings of DeepSpeed: the user's file, overridden by what the run decides."""

from collections.abc import Mapping
from typing import Any, Literal

from aki_megatron.config.deepspeed import offload_device
from aki_megatron.config.nested import merge
from aki_megatron.errors import ConfigError

OFFLOAD = "offload_optimizer"
"""DeepSpeed's section that moves master weights, moments and their gradients to host memory."""


def deepspeed_settings(
    user: Mapping[str, Any], *, zero_stage: Literal[1, 2, 3], precision: Literal["bf16", "fp32"], num_ranks: int
) -> dict[str, Any]:
    """Return the config of deepspeed.initialize for ``num_ranks`` data ranks; ``user`` is in DeepSpeed's own format.

    Raises ConfigError for offloading of a kind that the engine does not support.
    """
    _check_offload(user, zero_stage)
    offload = offload_device(user, OFFLOAD) != "none"
    return merge(user, _run_settings(zero_stage, precision, num_ranks, offload=offload))


def _check_offload(user: Mapping[str, Any], zero_stage: int) -> None:
    """Raise ConfigError for all offloading but that of the optimizer state to host memory in ZeRO 2 and 3."""
    if offload_device(user, "offload_param") != "none":
        raise ConfigError(
            f"zero_optimization.offload_param={user['zero_optimization']['offload_param']} in the DeepSpeed settings "
            "is not supported: parameters stay on the training device. Remove offload_param, or set its device to "
            "none; with more data ranks each holds less of them."
        )
    if offload_device(user, OFFLOAD) == "none":
        return
    section = user["zero_optimization"][OFFLOAD]
    if section["device"] != "cpu":
        raise ConfigError(
            f"zero_optimization.{OFFLOAD}.device={section['device']} in the DeepSpeed settings is not supported. Set "
            "it to cpu, or to none to keep the state on the training device."
        )
    if zero_stage == 1:
        raise ConfigError(
            f"zero_optimization.{OFFLOAD}={section} in the DeepSpeed settings needs ZeRO 2 or 3, but "
            f"parallel.zero_stage=1. Set parallel.zero_stage to 2, or remove {OFFLOAD}."
        )
    for name, only in (("ratio", 1.0), ("super_offload", False)):
        if section.get(name, only) != only:
            raise ConfigError(
                f"zero_optimization.{OFFLOAD}.{name}={section[name]} in the DeepSpeed settings is not supported: it "
                f"needs an optimizer that is compiled at start-up. Remove {name}."
            )


def _run_settings(zero_stage: int, precision: str, num_ranks: int, *, offload: bool) -> dict[str, Any]:
    """Return the settings that the run decides."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage == 3:
        # DeepSpeed's linear layer rounds differently from torch's
        zero["memory_efficient_linear"] = False
        # above 0, small parameters are gathered after the step by one collective each
        zero["stage3_param_persistence_threshold"] = 0
    elif not offload and (zero_stage == 2 or precision == "fp32"):
        zero["compute_grad_norm"] = False
    settings: dict[str, Any] = {
        "train_batch_size": num_ranks,  # the sizes are only used in DeepSpeed's throughput messages
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the engine sets the boundary itself
        "gradient_clipping": 0.0,  # the default is 1.0
        "steps_per_print": 10**9,
        # gradients reduced in bf16 have three times the error of one process's
        "communication_data_type": "fp32",
        "zero_optimization": zero,
    }
    if offload:
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW instead, which needs no compilation
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings
