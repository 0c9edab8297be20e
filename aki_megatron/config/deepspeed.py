"""``--ds_config FILE``: DeepSpeed's own settings in DeepSpeed's format, checked against the run.

Settings that the run decides may be ``"auto"`` or have the run's value; a contradiction is an error that names both.
Proven ones (config/deepspeed_keys.py) pass through to DeepSpeed and are saved with the run. All others are refused.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aki_megatron.config.deepspeed_keys import (
    ALIASES,
    BLOCKS,
    KNOWN,
    NOT_PROVEN,
    OFFLOAD_PARAM,
    ONLY,
    OWNED,
    PROVEN,
    REFUSED,
    REMOVED,
    SWITCHABLE,
)
from aki_megatron.config.field_info import format_value, suggestion
from aki_megatron.config.nested import check_depth, flatten, set_dotted
from aki_megatron.config.run import RunConfig
from aki_megatron.config.yaml_file import NESTED
from aki_megatron.errors import ConfigError

AUTO = "auto"
ACCUMULATION = "gradient_accumulation_steps"
ZERO = "zero_optimization"
OFFLOAD = (f"{ZERO}.offload_optimizer", OFFLOAD_PARAM)


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file. Raises ConfigError: no such file, broken JSON, duplicate key, no mapping."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        check_depth(values)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file (--ds_config takes DeepSpeed's JSON, for example configs/zero3.json)."
        ) from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path}: this is not JSON: {where}: {error.msg}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: {NESTED}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}.") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{path}: holds a value that cannot be read: {error}.") from None
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
    offload = settings.get(ZERO, {}).get(block) or {}
    return str(offload.get("device", "none"))


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every setting; empty blocks are skipped."""
    return ((name, value) for name, value in flatten(settings) if value != {})


def unknown_names(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence per name that DeepSpeed 0.19 does not read, at the top or inside zero_optimization."""
    names = list(values)
    if isinstance(values.get(ZERO), Mapping):
        names += [f"{ZERO}.{key}" for key in values[ZERO]]
    for name in names:
        if name in REMOVED:
            yield f"ds_config {name} was removed from DeepSpeed; delete it."
        elif name not in KNOWN and name not in BLOCKS:
            yield f"ds_config {name} is no setting of DeepSpeed 0.19{suggestion(name, sorted(KNOWN | BLOCKS))}"


def duplicate_spellings(settings: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence per setting that is there in both of its spellings."""
    names = {name for name, _ in _leaves(settings)}
    for name, other in ALIASES.items():
        if {name, other} <= names:
            yield f"ds_config {name} and {other} are one setting; keep one of them."


def _check_setting(name: str, value: Any, run: RunConfig) -> str | None:
    """Check one setting; return a sentence about what is wrong, "" for nothing to pass on, None to pass it on."""
    if (problem := _check_owned(name, value, run)) is not None:
        return problem
    if name in PROVEN:
        values = PROVEN[name].values
        return None if values.contains(value) else f"ds_config {name} must be {values.text}, got {format_value(value)}."
    if name in ONLY:
        only, why = ONLY[name]
        same = value == only and isinstance(value, bool) == isinstance(only, bool)
        return "" if same else f'ds_config {name}={format_value(value)}: {why}; write "auto" or delete it.'
    if name.startswith(f"{OFFLOAD_PARAM}.") and name not in REFUSED:
        return _check_offload_param(name, value)
    return _check_refused(name, value)


def _check_owned(name: str, value: Any, run: RunConfig) -> str | None:
    """Compare a setting that the run decides; return a sentence for a contradiction, "" for agreement, else None."""
    if name in OWNED:
        ours, get = OWNED[name]
        if value == get(run) and not isinstance(value, bool):
            return ""
        return (
            f"ds_config {name}={format_value(value)} but {ours}={format_value(get(run))}: "
            f'write "auto" in the ds_config, or add --{ours} {format_value(value)}.'
        )
    if name == "bf16.enabled":
        if not isinstance(value, bool):
            return f"ds_config {name} must be true or false, got {format_value(value)}."
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
    if name == ACCUMULATION and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        return f'ds_config {name} must be "auto" or a whole number >= 1, got {format_value(value)}.'
    return None


def _check_offload_param(name: str, value: Any) -> str | None:
    """Do the same for ``offload_param``, of which config/combinations.py refuses every device but "none"."""
    last = name.rpartition(".")[2]
    if last == "pin_memory":
        return "" if isinstance(value, bool) else f"ds_config {name} must be true or false, got {format_value(value)}."
    if last == "device":
        allowed = PROVEN[f"{ZERO}.offload_optimizer.device"].values
        return None if allowed.contains(value) else f'ds_config {name} must be "none", got {format_value(value)}.'
    return _check_refused(name, value)


def _check_refused(name: str, value: Any) -> str | None:
    """Do the same for a setting that is refused with every value, and for what nobody knows."""
    block = name.partition(".")[0]
    if name == ACCUMULATION:
        return None
    for prefix in (name, name.rpartition(".")[0], block):
        if prefix in REFUSED:
            what = "it" if prefix == name else "the block"
            return "" if value is None else f"ds_config {name}={format_value(value)}: {REFUSED[prefix]}; delete {what}."
    if name in BLOCKS:  # a block that is no mapping
        if name in OFFLOAD and value is None:
            return ""
        example = {ZERO: {"stage": "auto"}, "bf16": {"enabled": "auto"}}.get(name, {"device": "cpu"})
        suffix = f" such as {json.dumps(example)}" if name in (ZERO, "bf16", *OFFLOAD) else ""
        return f"ds_config {name} must be a mapping{suffix}, got {format_value(value)}."
    if block in SWITCHABLE:  # its ``enabled`` is refused
        return ""
    if block == ZERO and name.count(".") > 1:
        return f"ds_config {name} is no setting of DeepSpeed 0.19{suggestion(name, sorted(KNOWN))}"
    return f"ds_config {name}={format_value(value)}: {NOT_PROVEN}; delete it."


def _is_skipped(values: Mapping[str, Any], name: str) -> bool:
    """Whether a name is reported by unknown_names, or belongs to a block that is disabled."""
    block, _, rest = name.partition(".")
    known = block in KNOWN or block in BLOCKS
    if not known or (block == ZERO and rest and f"{ZERO}.{rest.partition('.')[0]}" not in KNOWN | BLOCKS):
        return True
    inner = values.get(block)
    disabled = isinstance(inner, Mapping) and any(inner.get("enabled", False) is off for off in (False, AUTO))
    return block in SWITCHABLE and (disabled or inner == {})


def resolve_settings(values: Mapping[str, Any], run: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the settings that pass through to DeepSpeed, and a sentence per problem or contradiction with the run."""
    problems = [*unknown_names(values), *duplicate_spellings(values)]
    passing: dict[str, Any] = {}
    for name, value in _leaves(values):
        if value == AUTO or _is_skipped(values, name):
            continue
        problem = _check_setting(name, value, run)
        if problem is None:
            set_dotted(passing, name, int(value) if isinstance(value, float) else value)
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
    """Return the settings to merge under the engine's own: those that are proven with the run's ZeRO stage.

    Others of the section have no effect in that stage, as gradient_accumulation_steps, which check_world compares.
    """
    settings: dict[str, Any] = {}
    for name, value in _leaves(run.deepspeed):
        if name in PROVEN and run.parallel.zero_stage in PROVEN[name].zero_stages:
            set_dotted(settings, name, value)
    return settings
