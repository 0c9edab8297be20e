"""DeepSpeed's settings: what the run decides over what the user's file says over our defaults. Pure."""

from collections.abc import Mapping
from typing import Any, Literal

from aki_megatron.errors import ConfigError

DEFAULTS = {"communication_data_type": "fp32"}
"""Settings a user may change. Gradients summed over ranks in bf16 err three times as much as those of one process."""


OFFLOAD = "offload_optimizer"
"""Name of DeepSpeed's section that moves masters, moments and their gradients to the host's memory."""


def deepspeed_settings(
    user: Mapping[str, Any], *, zero_stage: Literal[1, 2, 3], precision: Literal["bf16", "fp32"], ranks: int
) -> dict[str, Any]:
    """What deepspeed.initialize is given on ``ranks`` data ranks; ``user`` is in DeepSpeed's own format.

    Errors: ConfigError for offloading of a kind that the engine does not do.
    """
    zero = user.get("zero_optimization", {})
    _check_offload(zero, zero_stage)
    return _merge(_merge(DEFAULTS, user), _settings(zero_stage, precision, ranks, offload=offloads(zero)))


def offloads(zero: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's section ``zero_optimization`` asks to keep the optimizer's state in the host's memory."""
    return _device(zero, OFFLOAD) != "none"


def _device(zero: Mapping[str, Any], section: str) -> str:
    return (zero.get(section) or {}).get("device", "none")


def _check_offload(zero: Mapping[str, Any], zero_stage: int) -> None:
    """Raise ConfigError for all offloading but that of the optimizer's state to the host's memory in ZeRO 2 and 3."""
    if _device(zero, "offload_param") != "none":
        raise ConfigError(
            f"zero_optimization.offload_param={zero['offload_param']} in the DeepSpeed settings is not supported: "
            "weights stay on the training device. Remove offload_param, or set its device to none; more data ranks "
            "share them."
        )
    if not offloads(zero):
        return
    section = zero[OFFLOAD]
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


def _settings(zero_stage: int, precision: str, ranks: int, *, offload: bool) -> dict[str, Any]:
    """Settings that the run decides."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage == 3:
        # its own linear layer rounds differently from torch's
        zero["memory_efficient_linear"] = False
        # it would gather small parameters after the step, one collective each
        zero["stage3_param_persistence_threshold"] = 0
    elif not offload and (zero_stage == 2 or precision == "fp32"):
        zero["compute_grad_norm"] = False
    settings: dict[str, Any] = {
        "train_batch_size": ranks,  # only its throughput messages read the sizes
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the boundary is set by hand
        "gradient_clipping": 0.0,  # the default is 1.0
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
    if offload:
        settings["zero_force_ds_cpu_optimizer"] = False  # torch's own AdamW does it, and nothing has to be compiled
    if precision == "bf16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": False}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def _merge(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` wins, section by section."""
    merged = dict(under)
    for name, value in over.items():
        nested = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merge(merged[name], value) if nested else value
    return merged
