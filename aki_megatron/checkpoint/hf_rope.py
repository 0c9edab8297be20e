"""Rotary embeddings in config.json of language models, as transformers 4 and 5 write them, to RopeConfig."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from aki_megatron.config.model import RopeConfig
from aki_megatron.families.base import HFConfigKeys

ROPE_KEYS = {
    "default": {"theta": "rope_theta"},
    "longrope": {
        "theta": "rope_theta",
        "max_position_embeddings": "max_position_embeddings",
        "original_max_position_embeddings": "original_max_position_embeddings",
        "short_factor": "short_factor",
        "long_factor": "long_factor",
    },
    "llama3": {
        "theta": "rope_theta",
        "original_max_position_embeddings": "original_max_position_embeddings",
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
}
"""rope_type -> what its angles depend on: field of RopeConfig -> key of config.json."""


def unsupported_rope(hf: Mapping[str, Any], family: HFConfigKeys) -> Iterator[str]:
    """Yield every setting of a config.json ``hf`` that is missing, no number, or means other angles than ours."""
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(key) or {}, dict):
            yield f"{key}={hf[key]}; it must be a JSON object"
            return
    rope_type, settings = _rope_settings(hf, family)
    if rope_type not in family.rope_types:
        yield f"rope_type={rope_type}; supported for {hf['model_type']}: {', '.join(family.rope_types)}"
        return
    if {**hf, **settings}.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor; only rotary embeddings over the whole head dimension are supported"
    keys = ROPE_KEYS[rope_type].values()
    known = {*keys, "original_max_position_embeddings", "partial_rotary_factor"}
    found = {**hf, **settings}
    if rope_type == "longrope":
        # transformers computes these from the two lengths: what is written must say the same
        known |= {"factor"} | _computed_scaling(found, settings)
        longest, original = found.get("max_position_embeddings"), found.get("original_max_position_embeddings")
        if "factor" in settings and not _is_ratio(settings["factor"], longest, original):
            yield f"factor={settings['factor']}; only {longest} / {original}, the ratio of the lengths, is supported"
    yield from (
        f"{key}={text_of(found[key])}; it must be a number above 0" for key in keys if _is_no_number(key, found)
    )
    yield from (f"unknown {key}={settings[key]} for rope_type={rope_type}" for key in settings if key not in known)
    yield from (f"no {key}, which rope_type={rope_type} needs" for key in keys if key not in {**hf, **settings})


def rope_config(hf: Mapping[str, Any], family: HFConfigKeys) -> RopeConfig:
    """Return the section that a config.json ``hf`` without unsupported settings describes."""
    rope_type, settings = _rope_settings(hf, family)
    found = {**hf, **settings}
    values = {name: found[key] for name, key in ROPE_KEYS[rope_type].items()}
    return RopeConfig(**values | {"rope_type": rope_type, "max_position_embeddings": hf["max_position_embeddings"]})


def _rope_settings(hf: Mapping[str, Any], family: HFConfigKeys) -> tuple[str, dict[str, Any]]:
    """rope_type and its settings: transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    found = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    # null means absent, as in transformers; but for rope_theta, which has no other value then
    settings = {key: value for key, value in found.items() if value is not None or key == "rope_theta"}
    rope_type = settings.pop("type", "default")
    rope_type = settings.pop("rope_type", rope_type)
    return family.rope_type_aliases.get(str(rope_type), str(rope_type)), settings


def _computed_scaling(found: Mapping[str, Any], settings: Mapping[str, Any]) -> set[str]:
    """Return attention_factor where it is the scaling of cos and sin that the two lengths give; else nothing."""
    longest: Any = found.get("max_position_embeddings")
    original: Any = found.get("original_max_position_embeddings")
    given: Any = settings.get("attention_factor")
    if not all(isinstance(value, int | float) and value > 1 for value in (longest, original, given)):
        return set()
    computed = math.sqrt(1 + math.log(longest / original) / math.log(original))
    return {"attention_factor"} if math.isclose(given, computed, rel_tol=1e-4) else set()


def _is_ratio(factor: Any, longest: Any, original: Any) -> bool:
    numbers = all(isinstance(value, int | float) and value > 0 for value in (factor, longest, original))
    return numbers and math.isclose(factor, longest / original, rel_tol=1e-9)


def _is_no_number(key: str, found: Mapping[str, Any]) -> bool:
    """Whether a key of the rotary embedding is there with a value that is no number above 0; lists of factors pass."""
    value = found.get(key, 1)
    return not isinstance(value, list) and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0)


def text_of(value: Any) -> str:
    """Return a value as a message shows it."""
    return "null" if value is None else str(value)
