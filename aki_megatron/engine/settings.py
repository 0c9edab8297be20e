"""DeepSpeed's settings: what the run decides over what the user's file says over our defaults. Pure."""

from collections.abc import Mapping
from typing import Any, Literal

from aki_megatron.flow import ConfigError

DEFAULTS = {"communication_data_type": "fp32"}
"""Settings a user may change. Gradients summed over ranks in bf16 err three times as much as those of one process."""


def deepspeed_settings(
    user: Mapping[str, Any], *, zero_stage: Literal[1, 2, 3], precision: Literal["bf16", "fp32"], ranks: int
) -> dict[str, Any]:
    """What deepspeed.initialize is given on ``ranks`` data ranks; ``user`` is in DeepSpeed's own format.

    Errors: ConfigError for offloading, which the engine does not do.
    """
    settings = _merge(_merge(DEFAULTS, user), _settings(zero_stage, precision, ranks))
    _refuse_offload(settings["zero_optimization"])
    return settings


def _refuse_offload(zero: Mapping[str, Any]) -> None:
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name) and zero[name].get("device", "none") != "none":
            raise ConfigError(
                f"zero_optimization.{name}={zero[name]} in the DeepSpeed settings is not supported: state stays on the "
                f"training device. Remove {name}, or set its device to none; more data ranks share the state."
            )


def _settings(zero_stage: int, precision: str, ranks: int) -> dict[str, Any]:
    """Settings that the run decides."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage == 3:
        # its own linear layer rounds differently from torch's
        zero["memory_efficient_linear"] = False
        # it would gather small parameters after the step, one collective each
        zero["stage3_param_persistence_threshold"] = 0
    elif zero_stage == 2 or precision == "fp32":
        zero["compute_grad_norm"] = False
    settings: dict[str, Any] = {
        "train_batch_size": ranks,  # only its throughput messages read the sizes
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # the boundary is set by hand
        "gradient_clipping": 0.0,  # the default is 1.0
        "steps_per_print": 10**9,
        "zero_optimization": zero,
    }
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
