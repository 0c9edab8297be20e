"""Start from public weights: Hugging Face folders of SigLIP (the encoder) and Phi-3 (the language model).

Strict: config.json must agree with the run's model section (ConfigError names the keys that do not), and every tensor
must be there with the right shape (CheckpointError lists the others). Only safetensors are read, never a pickle.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from aki_megatron.checkpoint.weights import (
    DECODER_LAYER_RULES,
    DECODER_RULES,
    POOLING_RULES,
    VISION_LAYER_RULES,
    VISION_RULES,
    TensorFiles,
    check_shapes,
    model_shapes,
    names,
)
from aki_megatron.config.model import DecoderConfig, VisionConfig
from aki_megatron.flow import CheckpointError, ConfigError
from aki_megatron.model.split import cut, split_of
from aki_megatron.model.stage import Stage
from aki_megatron.model.vision import VisionEncoder

# (key of config.json, what transformers takes where the key is absent, our field)
_VISION_KEYS = (
    ("hidden_size", 768, "width"),
    ("num_hidden_layers", 12, "layers"),
    ("num_attention_heads", 12, "heads"),
    ("intermediate_size", 3072, "mlp_width"),
    ("image_size", 224, "image_size"),
    ("patch_size", 16, "patch_size"),
    ("layer_norm_eps", 1e-6, "norm_eps"),
)
_DECODER_KEYS = (
    ("hidden_size", 3072, "width"),
    ("num_hidden_layers", 32, "layers"),
    ("num_attention_heads", 32, "heads"),
    ("intermediate_size", 8192, "mlp_width"),
    ("rms_norm_eps", 1e-5, "norm_eps"),
    ("vocab_size", 32064, "vocab_rows"),
    ("tie_word_embeddings", False, "tie_embeddings"),
)


@torch.no_grad()
def load_pretrained(
    stage: Stage,
    *,
    vision: Path | None = None,
    language: Path | None = None,
    tensor_rank: int = 0,
    tensor_ranks: int = 1,
) -> list[str]:
    """Copy the weights of a SigLIP and/or a Phi-3 folder into a stage, before any engine partitions it.

    Tensors of other stages are left out, and of those that tensor ranks share only this rank's part is kept. One tensor
    is whole in memory at a time. Folders are compared with the whole model, whatever the stage. Returns the names of
    the stage's tensors that keep their random values (resampler, added tokens, head bias): Phi-3 has none of them.
    Raises ConfigError or CheckpointError.
    """
    decoder = stage.config.decoder
    own = dict(stage.named_parameters(remove_duplicate=False))
    fresh = set(own)
    sources = []
    if vision is not None:
        sources.append(_vision_source(vision, stage.config.vision))
    if language is not None:
        sources.append(_language_source(language, decoder))
    shapes = model_shapes(stage.config) if sources else {}
    for source in sources:
        wanted = {theirs: shapes[ours] for ours, theirs in source.table.items()}
        got = {name: shape for name, shape in source.files.shapes.items() if not name.startswith(source.unused)}
        check_shapes(got, wanted, str(source.files.path))
        here = {ours: theirs for ours, theirs in source.table.items() if ours in own}
        for theirs, tensor in source.files.read(here.values()):
            for ours in (ours for ours, name in here.items() if name == theirs):
                own[ours].copy_(cut(tensor, split_of(ours, decoder), tensor_rank, tensor_ranks))
        fresh -= set(here)
    return sorted(fresh)


def save_vision(encoder: VisionEncoder, config: VisionConfig, folder: Path) -> None:
    """Write an encoder as a Hugging Face folder of a SiglipVisionModel: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"front.vision.{name}": tensor for name, tensor in encoder.state_dict().items()}
    table = _vision_names(config, "vision_model.")
    save_file(
        {theirs: state[ours].detach().contiguous().cpu() for ours, theirs in table.items()},
        str(folder / "model.safetensors"),
        metadata={"format": "pt"},
    )
    described = {key: getattr(config, field) for key, _, field in _VISION_KEYS} | {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_act": "gelu_pytorch_tanh",
        "num_channels": 3,
        "vision_use_head": config.pooling_head,
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")


def _vision_names(config: VisionConfig, prefix: str) -> dict[str, str]:
    pooling = POOLING_RULES if config.pooling_head else ()
    return names((*VISION_RULES, *pooling), prefix=prefix) | names(
        VISION_LAYER_RULES, prefix=prefix, layers=config.layers
    )


@dataclass(frozen=True)
class _Source:
    """A folder's tensors, our names to theirs, and what their names begin with where we do not want them."""

    files: TensorFiles
    table: dict[str, str]
    unused: tuple[str, ...] = ()


def _vision_source(folder: Path, config: VisionConfig) -> _Source:
    described = _config_json(folder)
    described = described.get("vision_config", described)
    wrong = _differences(described, _VISION_KEYS, config, "model.vision")
    wrong += _fixed(described, {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3})
    if config.pooling_head and not described.get("vision_use_head", True):
        wrong.append("model.vision.pooling_head=True, the folder says vision_use_head=False")
    _raise_if(wrong, folder)
    files = TensorFiles(folder)
    # published folders and older transformers write the prefix, transformers 5 leaves it out of vision-only folders
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in files.shapes) else ""
    # the text tower of a full SigLIP is not used, nor is the pooling head where the configuration leaves it out
    unused: tuple[str, ...] = ("text_model.", "logit_scale", "logit_bias") if prefix else ()
    unused += () if config.pooling_head else (f"{prefix}head.",)
    return _Source(files, _vision_names(config, prefix), unused)


def _language_source(folder: Path, config: DecoderConfig) -> _Source:
    described = _config_json(folder)
    wrong = _differences(described, _DECODER_KEYS, config, "model.decoder")
    kv_heads = described.get("num_key_value_heads") or described.get("num_attention_heads", 32)
    if kv_heads != config.kv_heads:
        wrong.append(f"model.decoder.kv_heads={config.kv_heads}, the folder says num_key_value_heads={kv_heads}")
    wrong += _rope_differences(described, config)
    wrong += _fixed(described, {"model_type": "phi3", "hidden_act": "silu"})
    _raise_if(wrong, folder)
    table = names(DECODER_RULES) | names(DECODER_LAYER_RULES, layers=config.layers)
    if config.tie_embeddings:
        table["head.output.weight"] = table["front.embedding.table.weight"]
    return _Source(TensorFiles(folder), table)


def _config_json(folder: Path) -> dict[str, Any]:
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


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, bool) or not isinstance(ours, float):
        return ours == theirs
    return isinstance(theirs, int | float) and math.isclose(ours, theirs, rel_tol=1e-6)


def _differences(
    described: Mapping[str, Any], keys: Iterable[tuple[str, Any, str]], config: VisionConfig | DecoderConfig, part: str
) -> list[str]:
    rows = ((key, described.get(key, default), field, getattr(config, field)) for key, default, field in keys)
    return [
        f"{part}.{field}={ours}, the folder says {key}={theirs}"
        for key, theirs, field, ours in rows
        if not _same(ours, theirs)
    ]


def _fixed(described: Mapping[str, Any], needed: Mapping[str, Any]) -> list[str]:
    return [
        f"the model is built for {key}={value}, the folder says {key}={described[key]}"
        for key, value in needed.items()
        if described.get(key, value) != value
    ]


def _rope_differences(described: Mapping[str, Any], config: DecoderConfig) -> list[str]:
    """transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters."""
    scaling = described.get("rope_parameters") or described.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    found: dict[str, Any] = {
        "kind": "longrope" if kind == "su" else kind,  # the name of longrope in Phi-3's first releases
        "theta": scaling.get("rope_theta", described.get("rope_theta", 10000.0)),
    }
    if found["kind"] == "longrope":
        found["max_positions"] = described.get("max_position_embeddings", 4096)
        found["original_max_positions"] = scaling.get(
            "original_max_position_embeddings", described.get("original_max_position_embeddings", 4096)
        )
    wrong = [
        f"model.decoder.rope.{field}={getattr(config.rope, field)}, the folder says {value}"
        for field, value in found.items()
        if not _same(getattr(config.rope, field), value)
    ]
    for field in ("short_factor", "long_factor") if found["kind"] == "longrope" == config.rope.kind else ():
        ours, theirs = getattr(config.rope, field), scaling.get(field, [])
        if len(ours) != len(theirs) or not all(_same(float(a), b) for a, b in zip(ours, theirs, strict=True)):
            wrong.append(f"model.decoder.rope.{field} differs from the folder's: {theirs}")
    if scaling.get("partial_rotary_factor", described.get("partial_rotary_factor", 1.0)) != 1.0:
        wrong.append("the model turns whole heads, the folder has a partial_rotary_factor")
    return wrong


def _raise_if(wrong: list[str], folder: Path) -> None:
    if wrong:
        raise ConfigError(
            f"{folder / 'config.json'} describes another model than the run:\n"
            + "\n".join(f"  {line}" for line in wrong)
            + "\nChange the model section of the configuration, or give another folder."
        )
