"""config.json of Hugging Face folders to a section of our configuration, and back.

What differs between language models is in their family's file (aki_megatron/families); SigLIP and Whisper have a table
of keys each here. A folder whose model the layers here cannot compute (biases, sliding windows, other rotary
embeddings) is refused with the key that says so.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from aki_megatron.checkpoint.foreign_files import kind_of, refuse_other_folder, refuse_pointer
from aki_megatron.checkpoint.hf_rope import ROPE_KEYS, rope_config, text_of, unsupported_rope
from aki_megatron.config.model import AudioConfig, DecoderConfig, VisionConfig
from aki_megatron.config.section import Section
from aki_megatron.errors import CheckpointError, ConfigError
from aki_megatron.families.base import HFConfigKeys
from aki_megatron.families.registry import FAMILIES

VOCAB_SIZE_MULTIPLE = 64
"""A padded_vocab_size beyond the folder's vocab_size is a multiple of this, so that tensor ranks can split it."""

_DECODER_SIZES = (
    *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size", "padded_vocab_size"),
    "max_position_embeddings",
)
_VISION_SIZES = ("hidden_size", "num_layers", "num_heads", "intermediate_size", "image_size", "patch_size")
"""Fields that must be whole numbers above 0."""

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
"""Field of VisionConfig, key of config.json, value that transformers takes where config.json omits the key."""

_AUDIO_KEYS = (
    ("hidden_size", "d_model", 384),
    ("num_layers", "encoder_layers", 4),
    ("num_heads", "encoder_attention_heads", 6),
    ("intermediate_size", "encoder_ffn_dim", 1536),
    ("num_mel_bins", "num_mel_bins", 80),
)
"""The same of AudioConfig and Whisper."""

POSITIONS_PER_SECOND = 50
"""Of Whisper's encoder: max_source_positions are this many times the seconds of its input."""


def read_config_json(folder: Path) -> dict[str, Any]:
    """Return the config.json of a folder.

    Raises CheckpointError where it does not exist or cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        refuse_other_folder(folder)
        raise CheckpointError(
            f"{folder} is not a Hugging Face model folder: it has no config.json. "
            "Give the folder that holds config.json and model.safetensors."
        )
    try:
        refuse_pointer(path)
        config_json = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}) but {kind_of(path)}; fetch it again.") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(config_json, dict):
        raise CheckpointError(f"{path} must hold a JSON object; fetch it again.")
    return config_json


def _part(folder: Path, name: str) -> dict[str, Any]:
    """The part ``name`` of a folder's config.json; the whole of it where it has no such part."""
    config_json = read_config_json(folder)
    part = config_json.get(name, config_json)
    if not isinstance(part, dict):
        _refuse(folder, [f"{name}={text_of(part)}; it must be a JSON object"])
    return part


def decoder_config(folder: Path, *, vocab_size: int, num_added_tokens: int, lm_head_bias: bool = True) -> DecoderConfig:
    """Return the decoder that a language model's folder describes, with AKI's additions.

    vocab_size, num_added_tokens, lm_head_bias  what config.json does not say

    Raises CheckpointError without a readable config.json; ConfigError with everything in it that is not supported.
    """
    config_json = _part(folder, "text_config")  # where models with an encoder have their language model
    model_type = config_json.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        _refuse(folder, [f"model_type={model_type}; supported language models are {', '.join(FAMILIES)}"])
    family = FAMILIES[model_type].config
    hf = {"tie_word_embeddings": False, "rope_theta": 10000.0, **family.defaults, **config_json}
    keys = {"max_position_embeddings": "max_position_embeddings", **family.field_keys}
    problems = list(_no_sizes(hf, {name: keys[name] for name in _DECODER_SIZES}))
    if problems := problems or [*_unsupported_layers(hf, family), *unsupported_rope(hf, family)]:
        _refuse(folder, problems)
    values = {name: hf[key] for name, key in family.field_keys.items()}
    values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
    values["head_dim"] = hf.get("head_dim") or values["hidden_size"] // values["num_heads"]
    values["padded_vocab_size"] = padded_vocab_size(values["padded_vocab_size"], vocab_size + num_added_tokens)
    values |= {"vocab_size": vocab_size, "num_added_tokens": num_added_tokens, "lm_head_bias": lm_head_bias}
    return _build(folder, lambda: DecoderConfig(**values, rope=rope_config(hf, family)), keys)


def padded_vocab_size(rows: int, tokens: int) -> int:
    """Return ``rows``, the folder's vocab_size, where it suffices for all ``tokens``; else the next larger multiple."""
    return rows if tokens <= rows else math.ceil(tokens / VOCAB_SIZE_MULTIPLE) * VOCAB_SIZE_MULTIPLE


def vision_config(folder: Path) -> VisionConfig:
    """Return the encoder that a SigLIP folder describes, a whole SigLIP or its vision part alone.

    Raises CheckpointError without a readable config.json; ConfigError where it describes another encoder.
    """
    hf = {key: default for _, key, default in _VISION_KEYS} | _part(folder, "vision_config")
    required = {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", "num_channels": 3}
    sizes = {name: key for name, key, _ in _VISION_KEYS if name in _VISION_SIZES}
    if problems := [*_other_values(hf, required), *_no_sizes(hf, sizes)]:
        _refuse(folder, problems)
    keys = {name: key for name, key, _ in _VISION_KEYS}
    return _build(folder, lambda: VisionConfig(**{name: hf[key] for name, key in keys.items()}), keys)


def audio_config(folder: Path) -> AudioConfig:
    """Return the encoder that a Whisper folder describes.

    Raises CheckpointError without a readable config.json; ConfigError where it describes another encoder.
    """
    hf = read_config_json(folder)
    problems = list(_other_values(hf, {"model_type": "whisper", "activation_function": "gelu"}))
    positions = hf.get("max_source_positions", 1500)
    if not isinstance(positions, int) or positions < 1 or positions % POSITIONS_PER_SECOND:
        problems.append(
            f"max_source_positions={positions}; only multiples of {POSITIONS_PER_SECOND} (whole seconds) are supported"
        )
    if problems:
        _refuse(folder, problems)
    sizes = {name: hf.get(key, default) for name, key, default in _AUDIO_KEYS}
    return AudioConfig(**sizes, seconds=positions // POSITIONS_PER_SECOND)


def language_config_json(config: DecoderConfig) -> dict[str, Any]:
    """Return the config.json of a stock language model, as transformers 4 and 5 read it.

    It leaves out AKI's additions (added tokens, LM head bias) and special tokens, which the tokenizer has.

    Raises ConfigError where the family has no rotary embedding of this type.
    """
    rope, family = config.rope, FAMILIES[config.family].config
    if rope.rope_type not in family.rope_types:
        raise ConfigError(
            f"model.decoder.rope.rope_type={rope.rope_type} with family={config.family} has no name in Hugging Face "
            f"folders; models of that family have {' or '.join(family.rope_types)}."
        )
    hf = {key: getattr(config, name) for name, key in family.field_keys.items()} | {
        "architectures": [family.architecture],
        "hidden_act": "silu",
        "max_position_embeddings": rope.max_position_embeddings,
        "rope_theta": rope.theta,
        "rope_scaling": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **family.required,
    }
    if "head_dim" in family.defaults or config.attention_size != config.hidden_size:
        hf["head_dim"] = config.head_dim
    if rope.rope_type == "longrope":
        hf["original_max_position_embeddings"] = rope.original_max_position_embeddings
        hf["rope_scaling"] = {
            "type": "longrope",
            "short_factor": list(rope.short_factor),
            "long_factor": list(rope.long_factor),
        }
    elif rope.rope_type == "llama3":
        scaling = {key: getattr(rope, name) for name, key in ROPE_KEYS["llama3"].items() if name != "theta"}
        hf["rope_scaling"] = {"rope_type": "llama3"} | scaling
    return hf


def vision_config_json(config: VisionConfig) -> dict[str, Any]:
    """Return the config.json of a SiglipVisionModel."""
    return {key: getattr(config, name) for name, key, _ in _VISION_KEYS} | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
    }


def check_decoder_config(folder: Path, config: DecoderConfig) -> None:
    """Compare the run's decoder with the one that a folder describes.

    Raises ConfigError with every difference: our key, the folder's key, both values.
    """
    found = decoder_config(
        folder, vocab_size=config.vocab_size, num_added_tokens=config.num_added_tokens, lm_head_bias=config.lm_head_bias
    )
    keys = {**FAMILIES[found.family].config.field_keys, "head_dim": "head_dim"}
    rows_key = keys["padded_vocab_size"]
    if found.padded_vocab_size != read_config_json(folder).get(rows_key, found.padded_vocab_size):
        keys["padded_vocab_size"] = f"{rows_key}, padded to hold all tokens"
    differences = _differences("model.decoder", config, found, keys)
    rope_keys = {"rope_type": "rope_type"}
    if found.rope.rope_type == config.rope.rope_type:
        rope_keys |= ROPE_KEYS[found.rope.rope_type]
    _raise_if([*differences, *_differences("model.decoder.rope", config.rope, found.rope, rope_keys)], folder)


def check_vision_config(folder: Path, config: VisionConfig) -> None:
    """Compare the run's encoder with the one that a folder describes; the run may leave a pooling head out.

    Raises ConfigError with every difference: our key, the folder's key, both values.
    """
    keys = {name: key for name, key, _ in _VISION_KEYS if config.pooling_head or name != "pooling_head"}
    _raise_if(_differences("model.vision", config, vision_config(folder), keys), folder)


_Built = TypeVar("_Built", DecoderConfig, VisionConfig, AudioConfig)


def _build(folder: Path, make: Callable[[], _Built], keys: Mapping[str, str]) -> _Built:
    """Make a section of the configuration.

    keys  field -> key of config.json

    Raises ConfigError that names the folder and the key where a value contradicts the section.
    """
    try:
        return make()
    except ConfigError as error:
        _refuse(folder, [str(error)])
    except ValidationError as error:
        problems = []
        for one in error.errors():
            first, *rest = (str(name) for name in one["loc"])
            problems.append(f"{'.'.join([keys.get(first, first), *rest])}={text_of(one['input'])}: {one['msg']}")
        _refuse(folder, problems)


def check_audio_config(folder: Path, config: AudioConfig) -> None:
    """Compare the run's audio encoder with the one that a folder describes.

    Raises ConfigError with every difference: our key, the folder's key, both values.
    """
    keys = {name: key for name, key, _ in _AUDIO_KEYS} | {"seconds": f"max_source_positions / {POSITIONS_PER_SECOND}"}
    _raise_if(_differences("model.audio", config, audio_config(folder), keys), folder)


def _no_sizes(hf: Mapping[str, Any], keys: Mapping[str, str]) -> Iterator[str]:
    """Sizes that are no whole number above 0; num_key_value_heads may be null, which means as many as heads.

    keys  field -> key of config.json
    """
    for name, key in keys.items():
        value = hf[key]
        if name == "num_kv_heads" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{key}={text_of(value)}; it must be a whole number above 0"


def _unsupported_layers(hf: Mapping[str, Any], family: HFConfigKeys) -> Iterator[str]:
    """Everything but the rotary embedding that the layers here cannot compute."""
    yield from _other_values(hf, {"hidden_act": "silu", **family.required})
    hidden_key, heads_key = family.field_keys["hidden_size"], family.field_keys["num_heads"]
    head_dim = hf.get("head_dim")
    if head_dim is None and hf[hidden_key] % hf[heads_key]:
        yield f"{hidden_key}={hf[hidden_key]} / {heads_key}={hf[heads_key]} is no whole number; there is no head_dim"
    elif head_dim is not None and (not isinstance(head_dim, int) or isinstance(head_dim, bool) or head_dim < 1):
        yield f"head_dim={head_dim}; it must be a whole number above 0"
    if hf.get("quantization_config"):
        yield "quantization_config; give the folder of the full-precision model"
    window = hf.get("sliding_window")
    if window is not None and not isinstance(window, int):
        yield f"sliding_window={window}; it must be a whole number or null"
    elif _uses_sliding_window(hf, family) and hf["sliding_window"] < hf["max_position_embeddings"]:
        yield (
            f"sliding_window={hf['sliding_window']} below max_position_embeddings={hf['max_position_embeddings']}; "
            "only attention over the whole sequence is supported"
        )


def _uses_sliding_window(hf: Mapping[str, Any], family: HFConfigKeys) -> bool:
    """Whether any layer attends through a sliding window."""
    if hf.get("sliding_window") is None:
        return False
    if hf.get("layer_types"):
        return "sliding_attention" in hf["layer_types"]
    if family.sliding_window_switch is None:
        return True
    num_layers = hf[family.field_keys["num_layers"]]
    return bool(hf.get(family.sliding_window_switch)) and num_layers > hf.get("max_window_layers", 28)


def _other_values(hf: Mapping[str, Any], required: Mapping[str, Any]) -> Iterator[str]:
    yield from (
        f"{key}={hf[key]}; only {key}={value} is supported"
        for key, value in required.items()
        if hf.get(key, value) != value
    )


def _refuse(folder: Path, problems: list[str]) -> NoReturn:
    raise ConfigError(
        f"{folder / 'config.json'} describes a model that is not supported:\n"
        + "\n".join(f"  {line}" for line in problems)
        + "\nGive the folder of another model."
    )


def _raise_if(differences: list[str], folder: Path) -> None:
    if differences:
        raise ConfigError(
            f"{folder / 'config.json'} describes another model than the run:\n"
            + "\n".join(f"  {line}" for line in differences)
            + "\nChange the model section of the configuration, or give another folder."
        )


def _differences(section: str, config: Section, found: Section, keys: Mapping[str, str]) -> list[str]:
    """Fields in which the run's section and the folder's differ; ``keys`` is field -> key of config.json."""
    pairs = ((name, key, getattr(config, name), getattr(found, name)) for name, key in keys.items())
    return [
        f"{section}.{name}={_format(own)}, the folder has {key}={_format(other)}"
        for name, key, own, other in pairs
        if not _equal(own, other)
    ]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return math.isclose(one, other, rel_tol=1e-6) if isinstance(one, float) else bool(one == other)


def _format(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
