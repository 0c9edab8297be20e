"""``--ds_config FILE``: DeepSpeed's own settings in DeepSpeed's own format, compared with the run.

What the run decides may stand there as ``"auto"`` or with the run's value; a contradiction is an error that names both.
What is left (bucket sizes, offloading, breakdowns, ...) passes through to DeepSpeed and is saved with the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from aki_megatron.config.field_info import shown, suggestion
from aki_megatron.errors import ConfigError

if TYPE_CHECKING:
    from aki_megatron.config.run import RunConfig

AUTO = "auto"
ACCUMULATION = "gradient_accumulation_steps"
SWITCHED = frozenset(name.partition(".")[0] for name in FIXED if name.endswith(".enabled"))
"""Blocks that do nothing while ``enabled`` is not true."""


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ConfigError: no such file, broken JSON, a key twice, not a mapping."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
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
        raise ConfigError(f"{path}: DeepSpeed's settings are a JSON object, got {shown(values)}.")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ConfigError(f"the key {key} stands twice; keep one of them.")
        values[key] = value
    return values


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values; a list is a value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unknown_names(values: Mapping[str, Any]) -> Iterator[str]:
    """Names DeepSpeed 0.19 does not read, at the top and inside zero_optimization."""
    for key in values:
        if key in REMOVED:
            yield f"ds_config {key} was removed from DeepSpeed; delete it."
        elif key not in TOP_LEVEL:
            yield f"ds_config {key} is no setting of DeepSpeed 0.19{suggestion(key, TOP_LEVEL)}"
    zero = values.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        yield f'ds_config zero_optimization must be a mapping such as {{"stage": "auto"}}, got {shown(zero)}.'
        return
    for key in zero:
        if key not in ZERO:
            yield (
                f"ds_config zero_optimization.{key} is no setting of DeepSpeed 0.19"
                + suggestion(f"zero_optimization.{key}", [f"zero_optimization.{name}" for name in sorted(ZERO)])
            )


def _decided(name: str, value: Any, run: RunConfig) -> str | None:
    """Compare a leaf with the run: a sentence for a contradiction, "" for agreement, None for what passes through."""
    block = name.partition(".")[0]
    if name in OWNED:
        ours, get = OWNED[name]
        if value == get(run) and not isinstance(value, bool):
            return ""
        return (
            f"ds_config {name}={shown(value)} but {ours}={shown(get(run))}: "
            f'write "auto" in the ds_config, or add --{ours} {shown(value)}.'
        )
    if name == "bf16.enabled":
        if value is (run.train.precision == "bf16"):
            return ""
        other = "bf16" if value is True else "fp32"
        return (
            f"ds_config bf16.enabled={shown(value)} but train.precision={run.train.precision}: "
            f'write "auto" in the ds_config, or add --train.precision {other}.'
        )
    if name == "optimizer.params.betas":
        betas = [run.optimizer.beta1, run.optimizer.beta2]
        if value == betas:
            return ""
        return (
            f"ds_config {name}={shown(value)} but optimizer.beta1={betas[0]} and optimizer.beta2={betas[1]}: "
            'write "auto" in the ds_config, or change the two.'
        )
    if name in FIXED:
        only, why = FIXED[name]
        return "" if value == only else f'ds_config {name}={shown(value)}: {why}; write "auto" or delete it.'
    if block == "optimizer":
        return f"ds_config {name}={shown(value)}: the optimizer is the run's (optimizer.*); delete it."
    if name in WITHOUT_USE:
        return f"ds_config {name}={shown(value)}: {WITHOUT_USE[name]}; delete it."
    if block in REFUSED:
        return f"ds_config {name}={shown(value)}: {REFUSED[block]}; delete the block."
    if name == ACCUMULATION and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        return f'ds_config {name} must be "auto" or a whole number >= 1, got {shown(value)}.'
    return _offloading(name, value)


def _offloading(name: str, value: Any) -> str | None:
    """The same for the blocks that move state off the device. Whether a run may offload at all, and with what it goes
    together, config/combinations.py says."""
    if name in OFFLOAD:  # a block that is no mapping
        if value is None:
            return ""
        return f'ds_config {name} must be a mapping such as {{"device": "cpu"}}, got {shown(value)}.'
    around, _, last = name.rpartition(".")
    if around not in OFFLOAD:
        return None
    if last not in OFFLOAD[around]:
        names = [f"{around}.{known}" for known in sorted(OFFLOAD[around])]
        return f"ds_config {name} is no setting of DeepSpeed 0.19{suggestion(name, names)}"
    if last == "device" and value not in DEVICES:
        return f'ds_config {name} must be "cpu" or "none", got {shown(value)}.'
    if last == "pin_memory" and not isinstance(value, bool):
        return f"ds_config {name} must be true or false, got {shown(value)}."
    return None


def _dormant(values: Mapping[str, Any], block: str) -> bool:
    inner = values.get(block)
    return block in SWITCHED and isinstance(inner, Mapping) and inner.get("enabled", False) in (False, AUTO)


def settle(values: Mapping[str, Any], run: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """What passes through to DeepSpeed, and the contradictions with the run."""
    problems = list(unknown_names(values))
    passing: dict[str, Any] = {}
    for name, value in leaves(values):
        block = name.partition(".")[0]
        if block not in TOP_LEVEL or value == AUTO or _dormant(values, block):
            continue
        verdict = _decided(name, value, run)
        if verdict is None:
            inner = passing
            *path, last = name.split(".")
            for part in path:
                inner = inner.setdefault(part, {})
            inner[last] = value
        elif verdict:
            problems.append(verdict)
    return passing, problems


def problems_of_settings(settings: Mapping[str, Any], run: RunConfig) -> list[str]:
    """What is wrong with the ``deepspeed`` section of a run."""
    passing, problems = settle(settings, run)
    if not problems and passing != settings:
        kept = {name for name, _ in leaves(passing)}
        extra = [name for name, _ in leaves(settings) if name not in kept]
        problems.append(f"deepspeed holds {', '.join(extra) or 'empty blocks'}, which the run decides; delete them.")
    return problems or list(without_effect(settings, run))


def without_effect(settings: Mapping[str, Any], run: RunConfig) -> Iterator[str]:
    """Settings of a run that does without DeepSpeed. Offloading is refused in config/combinations.py."""
    names = [name for name, _ in leaves(settings) if name != ACCUMULATION and name.rpartition(".")[0] not in OFFLOAD]
    if names and run.parallel.zero_stage == 0:
        yield (
            f"deepspeed holds {', '.join(names)}, but parallel.zero_stage=0 does without DeepSpeed; "
            "delete what it holds, or add --parallel.zero_stage 1."
        )


def settings_for_engine(run: RunConfig) -> dict[str, Any]:
    """The settings to merge under the engine's own. Accumulation is the engine's; check_world has compared it."""
    return {key: value for key, value in run.deepspeed.items() if key != ACCUMULATION}
