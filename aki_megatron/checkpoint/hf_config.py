"""Backbones: what the config.json of a Hugging Face folder says, as a section of our configuration, and back.

One row of BACKBONES per family of language models, one table of keys for SigLIP. What a folder says and the layers here
are not built for (other head widths, biases, sliding windows, other rotary embeddings) is refused by the folder's key.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from aki_megatron.config.model import DecoderConfig, RopeConfig, VisionConfig
from aki_megatron.config.section import Section
from aki_megatron.errors import CheckpointError, ConfigError

ROWS_MULTIPLE = 64
"""Tables that have no room for the added tokens grow to a multiple of this, which tensor ranks can share."""


@dataclass(frozen=True)
class Backbone:
    """One kind of language model as transformers knows it."""

    architecture: str
    silent: Mapping[str, Any]
    """What transformers takes where config.json does not say."""
    built_for: Mapping[str, Any] = field(default_factory=dict)
    """Keys that must have one value where they are said at all."""
    ropes: tuple[str, ...] = ("default",)


_QWEN = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}

BACKBONES: dict[str, Backbone] = {
    "phi3": Backbone(
        "Phi3ForCausalLM",
        silent={
            "hidden_size": 3072,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "intermediate_size": 8192,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
        },
        ropes=("default", "longrope"),
    ),
    "llama": Backbone(
        "LlamaForCausalLM",
        silent={
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "intermediate_size": 11008,
            "rms_norm_eps": 1e-6,
            "vocab_size": 32000,
            "max_position_embeddings": 2048,
        },
        built_for={"attention_bias": False, "mlp_bias": False},
        ropes=("default", "llama3"),
    ),
    "qwen2": Backbone("Qwen2ForCausalLM", silent=_QWEN),
    "qwen3": Backbone("Qwen3ForCausalLM", silent=_QWEN | {"head_dim": 128}, built_for={"attention_bias": False}),
}
"""Families by model_type, as in config/model.py."""

_LANGUAGE_KEYS = {
    "family": "model_type",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "padded_vocab_size": "vocab_size",
    "tie_word_embeddings": "tie_word_embeddings",
}
"""Our field -> the key of config.json."""

_ROPE_KEYS = {
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
"""Kind of rotary embedding -> what its angles depend on, our field and the key of config.json."""

_VISION_KEYS = (
    ("hidden_size", "hidden_size", 768),
    ("num_layers", "num_hidden_layers", 12),
    ("num_heads", "num_attention_heads", 12),
    ("intermediate_size", "intermediate_size", 3072),
    ("image_size", "image_size", 224),
    ("patch_size", "patch_size", 16),
    ("norm_eps", "layer_norm_eps", 1e-6),
    ("pooling_head", "vision_use_head", True),
)
"""Our field, the key of config.json, what transformers takes where it does not say."""


def read_description(folder: Path) -> dict[str, Any]:
    """The config.json of a folder.

    Errors: CheckpointError where there is none or it cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a Hugging Face model folder: it has no config.json. "
            "Give the folder that holds config.json and model.safetensors."
        )
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch it again.") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{path} must hold a JSON object; fetch it again.")
    return described


def decoder_config(folder: Path, *, vocab_size: int, num_added_tokens: int, lm_head_bias: bool = True) -> DecoderConfig:
    """The decoder of a language model's folder, with the added tokens, which are not the folder's to say.

    Where the folder's tables have no row for every token, ``padded_vocab_size`` is grown to a multiple of ROWS_MULTIPLE.

    Errors: CheckpointError without a readable config.json; ConfigError that names everything in it that the decoder
    is not built for.
    """
    described = read_description(folder)
    described = described.get("text_config", described)  # folders with an encoder describe their language model there
    family = BACKBONES.get(described.get("model_type", ""))
    if family is None:
        _refuse(
            folder, [f"model_type={described.get('model_type')}; language models are read of {', '.join(BACKBONES)}"]
        )
    said = {"tie_word_embeddings": False, "rope_theta": 10000.0, **family.silent, **described}
    if wrong := [*_unfit(said, family), *_unfit_rotary(said, family)]:
        _refuse(folder, wrong)
    values = {ours: said[key] for ours, key in _LANGUAGE_KEYS.items()}
    values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
    values["padded_vocab_size"] = grown_rows(values["padded_vocab_size"], vocab_size + num_added_tokens)
    values |= {"vocab_size": vocab_size, "num_added_tokens": num_added_tokens, "lm_head_bias": lm_head_bias}
    return DecoderConfig(**values, rope=_rope(said))


def grown_rows(rows: int, tokens: int) -> int:
    """Rows of the tables that a folder with ``rows`` needs for so many tokens."""
    return rows if tokens <= rows else math.ceil(tokens / ROWS_MULTIPLE) * ROWS_MULTIPLE


def vision_config(folder: Path) -> VisionConfig:
    """The encoder of a folder of a SigLIP, whole or of its vision part alone.

    Errors: CheckpointError without a readable config.json; ConfigError where it describes another encoder.
    """
    described = read_description(folder)
    described = described.get("vision_config", described)
    wanted = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
    if wrong := list(_other_than(described, wanted)):
        _refuse(folder, wrong)
    return VisionConfig(**{ours: described.get(key, silent) for ours, key, silent in _VISION_KEYS})


def describe_language(config: DecoderConfig) -> dict[str, Any]:
    """A stock config.json of the decoder, as transformers 4 and 5 read it; special tokens are left to the tokenizer.

    It describes the tables and layers alone: the added tokens and the head's bias have no place in a stock model.

    Errors: ConfigError where models of the family have no rotary embedding of this kind.
    """
    rope, family = config.rope, BACKBONES[config.family]
    if rope.rope_type not in family.ropes:
        raise ConfigError(
            f"model.decoder.rope.rope_type={rope.rope_type} with family={config.family} has no name in Hugging Face folders; "
            f"models of that family have {' or '.join(family.ropes)}."
        )
    described = {key: getattr(config, ours) for ours, key in _LANGUAGE_KEYS.items()} | {
        "architectures": [family.architecture],
        "hidden_act": "silu",
        "max_position_embeddings": rope.max_position_embeddings,
        "rope_theta": rope.theta,
        "rope_scaling": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **family.built_for,
    }
    if "head_dim" in family.silent:
        described["head_dim"] = config.head_dim
    if rope.rope_type == "longrope":
        described["original_max_position_embeddings"] = rope.original_max_position_embeddings
        described["rope_scaling"] = {
            "type": "longrope",
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
        }
    elif rope.rope_type == "llama3":
        keys = {ours: key for ours, key in _ROPE_KEYS["llama3"].items() if ours != "theta"}
        described["rope_scaling"] = {"rope_type": "llama3"} | {key: getattr(rope, ours) for ours, key in keys.items()}
    return described


def describe_vision(config: VisionConfig) -> dict[str, Any]:
    """The config.json of a SiglipVisionModel."""
    return {key: getattr(config, ours) for ours, key, _ in _VISION_KEYS} | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
    }


def check_language(folder: Path, config: DecoderConfig) -> None:
    """Compare the run's decoder with the one that a folder describes.

    Errors: ConfigError that names every difference by our key and the folder's.
    """
    theirs = decoder_config(
        folder, vocab_size=config.vocab_size, num_added_tokens=config.num_added_tokens, lm_head_bias=config.lm_head_bias
    )
    grown = theirs.padded_vocab_size != read_description(folder).get("vocab_size", theirs.padded_vocab_size)
    keys = _LANGUAGE_KEYS | ({"padded_vocab_size": "vocab_size, grown to hold all tokens"} if grown else {})
    wrong = _differences("model.decoder", config, theirs, keys)
    angles = {"kind": "rope_type"} | (
        _ROPE_KEYS[theirs.rope.rope_type] if theirs.rope.rope_type == config.rope.rope_type else {}
    )
    _raise_if([*wrong, *_differences("model.decoder.rope", config.rope, theirs.rope, angles)], folder)


def check_vision(folder: Path, config: VisionConfig) -> None:
    """Compare the run's encoder with the one that a folder describes; a pooling head may be left out.

    Errors: ConfigError that names every difference by our key and the folder's.
    """
    keys = {ours: key for ours, key, _ in _VISION_KEYS if config.pooling_head or ours != "pooling_head"}
    _raise_if(_differences("model.vision", config, vision_config(folder), keys), folder)


def _unfit(said: Mapping[str, Any], family: Backbone) -> Iterator[str]:
    """What the layers are not built for, rotary embedding aside."""
    yield from _other_than(said, {"hidden_act": "silu", **family.built_for})
    head_dim = said["hidden_size"] / said["num_attention_heads"]
    if (said.get("head_dim") or head_dim) != head_dim:
        yield f"head_dim={said['head_dim']}; heads are hidden_size / num_attention_heads = {head_dim:g} wide here"
    if said.get("quantization_config"):
        yield "quantization_config; give the folder of the full-precision model"
    if _windowed(said) and said["sliding_window"] < said["max_position_embeddings"]:
        yield (
            f"sliding_window={said['sliding_window']} below max_position_embeddings={said['max_position_embeddings']}; "
            "attention here sees the whole sequence"
        )


def _windowed(said: Mapping[str, Any]) -> bool:
    """Whether any layer looks through a sliding window: all of Phi-3's, of Qwen's those above max_window_layers."""
    if said.get("sliding_window") is None:
        return False
    if said.get("layer_types"):
        return "sliding_attention" in said["layer_types"]
    if said["model_type"] == "phi3":
        return True
    return bool(said.get("use_sliding_window")) and said["num_hidden_layers"] > said.get("max_window_layers", 28)


def _rotary(said: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Kind and settings: transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    settings = dict(said.get("rope_parameters") or said.get("rope_scaling") or {})
    kind = settings.pop("type", "default")
    kind = settings.pop("rope_type", kind)
    return "longrope" if kind == "su" else kind, settings  # its name in Phi-3's first releases


def _unfit_rotary(said: Mapping[str, Any], family: Backbone) -> Iterator[str]:
    kind, settings = _rotary(said)
    if kind not in family.ropes:
        yield f"rope_type={kind}; {said['model_type']} is read with {' or '.join(family.ropes)}"
        return
    if {**said, **settings}.get("partial_rotary_factor", 1.0) != 1.0:
        yield "partial_rotary_factor; whole heads are turned here"
    known = {*_ROPE_KEYS[kind].values(), "original_max_position_embeddings", "partial_rotary_factor"}
    yield from (
        f"{key}={settings[key]} for rope_type={kind}, which is not known" for key in settings if key not in known
    )
    lacking = [key for key in _ROPE_KEYS[kind].values() if key not in {**said, **settings}]
    yield from (f"no {key}, which rope_type={kind} needs" for key in lacking)


def _rope(said: Mapping[str, Any]) -> RopeConfig:
    kind, settings = _rotary(said)
    found = {**said, **settings}
    values = {ours: found[key] for ours, key in _ROPE_KEYS[kind].items()}
    return RopeConfig(**values | {"kind": kind, "max_position_embeddings": said["max_position_embeddings"]})


def _other_than(said: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        f"{key}={said[key]}; the model here is built for {key}={value}"
        for key, value in wanted.items()
        if said.get(key, value) != value
    )


def _refuse(folder: Path, wrong: list[str]) -> NoReturn:
    raise ConfigError(
        f"{folder / 'config.json'} describes a model that cannot be built here:\n"
        + "\n".join(f"  {line}" for line in wrong)
        + "\nGive the folder of another model."
    )


def _raise_if(wrong: list[str], folder: Path) -> None:
    if wrong:
        raise ConfigError(
            f"{folder / 'config.json'} describes another model than the run:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\nChange the model section of the configuration, or give another folder."
        )


def _differences(part: str, config: Section, theirs: Section, keys: Mapping[str, str]) -> list[str]:
    """Fields in which two sections differ, by our name and the folder's."""
    pairs = ((ours, key, getattr(config, ours), getattr(theirs, ours)) for ours, key in keys.items())
    return [
        f"{part}.{ours}={_shown(wanted)}, the folder says {key}={_shown(found)}"
        for ours, key, wanted, found in pairs
        if not _same(wanted, found)
    ]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) else bool(one == other)


def _shown(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
