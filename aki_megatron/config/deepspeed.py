"""``--ds_config FILE``: DeepSpeed's own settings in DeepSpeed's format, checked against the run.

Settings that the run decides may be ``"auto"`` or have the run's value; a contradiction is an error that names both.
All others (bucket sizes, offloading, breakdowns, ...) pass through to DeepSpeed and are saved with the run.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aki_megatron.config.deepspeed_keys import (
    DEVICES,
    FIXED,
    OFFLOAD,
    OWNED,
    REFUSED,
    REMOVED,
    TOP_LEVEL,
    WITHOUT_USE,
    ZERO,
)
from aki_megatron.config.field_info import format_value, suggestion
from aki_megatron.config.nested import flatten, set_dotted
from aki_megatron.config.run import RunConfig
from aki_megatron.errors import ConfigError

AUTO = "auto"
ACCUMULATION = "gradient_accumulation_steps"
SWITCHABLE = frozenset(name.partition(".")[0] for name in FIXED if name.endswith(".enabled"))
"""Blocks that have no effect unless ``enabled`` is true."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file. Raises ConfigError: no such file, broken JSON, duplicate key, no mapping."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file (--ds_config takes DeepSpeed's JSON, for example configs/zero3.json)."
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path}: this is not JSON: {where}: {error.msg}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}.") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: DeepSpeed's settings are a JSON object, got {format_value(values)}.")
    return values


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ConfigError(f"the key {key} is there twice; keep one of them.")
        values[key] = value
    return values


def offload_device(settings: Mapping[str, Any], block: str) -> str:
    """Return the device that ``offload_optimizer`` or ``offload_param`` of DeepSpeed's settings names, or "none"."""
    offload = settings.get("zero_optimization", {}).get(block) or {}
    return str(offload.get("device", "none"))


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every setting; empty blocks are skipped."""
    return ((name, value) for name, value in flatten(settings) if value != {})


def unknown_names(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence per name that DeepSpeed 0.19 does not read, at the top or inside zero_optimization."""
    for key in values:
        if key in REMOVED:
            yield f"ds_config {key} was removed from DeepSpeed; delete it."
        elif key not in TOP_LEVEL:
            yield f"ds_config {key} is no setting of DeepSpeed 0.19{suggestion(key, TOP_LEVEL)}"
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f'ds_config zero_optimization must be a mapping such as {{"stage": "auto"}}, got {format_value(zero)}.'
        return
    for key in zero:
        if key not in ZERO:
            yield (
                f"ds_config zero_optimization.{key} is no setting of DeepSpeed 0.19"
                + suggestion(f"zero_optimization.{key}", [f"zero_optimization.{name}" for name in sorted(ZERO)])
            )


def _compare(name: str, value: Any, run: RunConfig) -> str | None:
    """Compare a setting with the run; return a sentence for a contradiction, "" for agreement, None to pass it on."""
    block = name.partition(".")[0]
    if name in OWNED:
        ours, get = OWNED[name]
        if value == get(run) and not isinstance(value, bool):
            return ""
        return (
            f"ds_config {name}={format_value(value)} but {ours}={format_value(get(run))}: "
            f'write "auto" in the ds_config, or add --{ours} {format_value(value)}.'
        )
    if name == "bf16.enabled":
        if value is (run.train.precision == "bf16"):
            return ""
        other = "bf16" if value is True else "fp32"
        return (
            f"ds_config bf16.enabled={format_value(value)} but train.precision={run.train.precision}: "
            f'write "auto" in the ds_config, or add --train.precision {other}.'
        )
    if name == "optimizer.params.betas":
        betas = [run.optimizer.beta1, run.optimizer.beta2]
        if value == betas:
            return ""
        return (
            f"ds_config {name}={format_value(value)} but optimizer.beta1={betas[0]} and optimizer.beta2={betas[1]}: "
            'write "auto" in the ds_config, or change the two.'
        )
    if name in FIXED:
        only, why = FIXED[name]
        return "" if value == only else f'ds_config {name}={format_value(value)}: {why}; write "auto" or delete it.'
    if block == "optimizer":
        return f"ds_config {name}={format_value(value)}: the optimizer is the run's (optimizer.*); delete it."
    if name in WITHOUT_USE:
        return f"ds_config {name}={format_value(value)}: {WITHOUT_USE[name]}; delete it."
    if block in REFUSED:
        return f"ds_config {name}={format_value(value)}: {REFUSED[block]}; delete the block."
    if name == ACCUMULATION and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        return f'ds_config {name} must be "auto" or a whole number >= 1, got {format_value(value)}.'
    return _compare_offload(name, value)


def _compare_offload(name: str, value: Any) -> str | None:
    """Do the same for the offload blocks. config/combinations.py decides which runs may offload."""
    if name in OFFLOAD:  # a block that is no mapping
        if value is None:
            return ""
        return f'ds_config {name} must be a mapping such as {{"device": "cpu"}}, got {format_value(value)}.'
    block, _, last = name.rpartition(".")
    if block not in OFFLOAD:
        return None
    if last not in OFFLOAD[block]:
        names = [f"{block}.{known}" for known in sorted(OFFLOAD[block])]
        return f"ds_config {name} is no setting of DeepSpeed 0.19{suggestion(name, names)}"
    if last == "device" and value not in DEVICES:
        return f'ds_config {name} must be "cpu" or "none", got {format_value(value)}.'
    if last == "pin_memory" and not isinstance(value, bool):
        return f"ds_config {name} must be true or false, got {format_value(value)}."
    return None


def _is_disabled(values: Mapping[str, Any], block: str) -> bool:
    inner = values.get(block)
    return block in SWITCHABLE and isinstance(inner, Mapping) and inner.get("enabled", False) in (False, AUTO)


def resolve_settings(values: Mapping[str, Any], run: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that pass through to DeepSpeed, and a sentence per contradiction with the run."""
    problems = list(unknown_names(values))
    passing: dict[str, Any] = {}
    for name, value in _leaves(values):
        block = name.partition(".")[0]
        if block not in TOP_LEVEL or value == AUTO or _is_disabled(values, block):
            continue
        problem = _compare(name, value, run)
        if problem is None:
            set_dotted(passing, name, value)
        elif problem:
            problems.append(problem)
    return passing, problems


def problems_of_settings(settings: Mapping[str, Any], run: RunConfig) -> list[str]:
    """Return what is wrong with the ``deepspeed`` section of a run, a sentence each."""
    passing, problems = resolve_settings(settings, run)
    if not problems and passing != settings:
        kept = {name for name, _ in _leaves(passing)}
        extra = [name for name, _ in _leaves(settings) if name not in kept]
        problems.append(f"deepspeed holds {', '.join(extra) or 'empty blocks'}, which the run decides; delete them.")
    return problems or list(without_effect(settings, run))


def without_effect(settings: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    """Yield a sentence about settings of a run that does not use DeepSpeed; combinations.py refuses offloading."""
    names = [name for name, _ in _leaves(settings) if name != ACCUMULATION and name.rpartition(".")[0] not in OFFLOAD]
    if names and run.parallel.zero_stage == 0:
        yield (
            f"deepspeed holds {', '.join(names)}, but parallel.zero_stage=0 does not use DeepSpeed; "
            "delete what it holds, or add --parallel.zero_stage 1."
        )


def settings_for_engine(run: RunConfig) -> dict[str, Any]:
    """Return the settings to merge under the engine's own, without accumulation, which check_world compares."""
    return {key: value for key, value in run.deepspeed.items() if key != ACCUMULATION}
