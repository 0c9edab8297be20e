"""Configuration keys that were renamed. A renamed key is refused with its new name; it is never accepted silently."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aki_megatron.config.nested import Location, dotted

_SIZES = {
    "width": "hidden_size",
    "layers": "num_layers",
    "heads": "num_heads",
    "mlp_width": "intermediate_size",
}
"""Old -> new names that model.vision and model.decoder share."""

MOVED_KEYS: dict[str, str] = {
    **{f"model.vision.{old}": f"model.vision.{new}" for old, new in _SIZES.items()},
    "model.resampler.latents": "model.resampler.num_latents",
    "model.resampler.layers": "model.resampler.num_layers",
    "model.resampler.heads": "model.resampler.num_heads",
    "model.resampler.head_width": "model.resampler.head_dim",
    **{f"model.decoder.{old}": f"model.decoder.{new}" for old, new in _SIZES.items()},
    "model.decoder.kv_heads": "model.decoder.num_kv_heads",
    "model.decoder.vocab_rows": "model.decoder.padded_vocab_size",
    "model.decoder.base_tokens": "model.decoder.vocab_size",
    "model.decoder.extra_tokens": "model.decoder.num_added_tokens",
    "model.decoder.head_bias": "model.decoder.lm_head_bias",
    "model.decoder.tie_embeddings": "model.decoder.tie_word_embeddings",
    "model.decoder.rope.kind": "model.decoder.rope.rope_type",
    "model.decoder.rope.max_positions": "model.decoder.rope.max_position_embeddings",
    "model.decoder.rope.original_max_positions": "model.decoder.rope.original_max_position_embeddings",
    "data.shards": "data.captions",
    "data.sources[].dialogues": "data.sources[].split_turns",
    "data.packing.row_tokens": "data.packing.sequence_length",
    "data.packing.row_images": "data.packing.max_images",
    "data.packing.block_samples": "data.packing.buffer_size",
    "data.workers": "data.num_workers",
    "train.global_batch": "train.global_batch_size",
    "train.micro_batch": "train.micro_batch_size",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "parallel.chunks": "parallel.virtual_stages",
    "parallel.check_every": "parallel.mask_check_interval",
    "checkpoint.every": "checkpoint.interval",
    "checkpoint.asynchronous": "checkpoint.async_save",
    "watch.start_seconds": "watch.init_timeout",
    "watch.hang_seconds": "watch.step_timeout",
    "watch.hang_factor": "watch.step_timeout_factor",
    "watch.non_finite": "watch.on_non_finite",
    "watch.spike": "watch.on_loss_spike",
    "watch.spike_factor": "watch.loss_spike_factor",
    "watch.spike_window": "watch.loss_spike_window",
    "log.every": "log.interval",
}
"""Old dotted key -> new dotted key; ``[]`` stands for any index of a list."""

NEW_FORMATS: dict[str, str] = {
    "data.captions": "a list such as [{name: kale, shards: [...]}]",
    "data.sources[].split_turns": "true instead of single, false instead of whole",
}
"""New dotted key -> how its value is written, where that changed too."""

MOVED_VALUES: dict[str, dict[str, Any]] = {
    "data.mixing": {"length": "proportional"},
    "data.sources[].split_turns": {"single": True, "whole": False},
}
"""Key by its new name -> old value -> new value."""


def moved_keys(values: Mapping[str, Any]) -> Iterator[tuple[Location, str]]:
    """Yield (location, sentence with the new name) of every renamed key and value in ``values``."""
    for location, pattern, value in _walk(values, (), ""):
        key = dotted(location)
        if pattern in MOVED_KEYS:
            new = MOVED_KEYS[pattern]
            sentence = f"{key} is called {new.replace('[]', _indices(location))} now"
            yield location, sentence + (f": {NEW_FORMATS[new]}." if new in NEW_FORMATS else ".")
        elif isinstance(value, str) and value in MOVED_VALUES.get(pattern, {}):
            yield location, f"{key}: the value {value} is called {MOVED_VALUES[pattern][value]} now."


def rename_moved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` with every renamed key and value under its new name, to upgrade files of before."""
    return _renamed(values, "")


def upgrade_hint(path: Path, values: Mapping[str, Any]) -> str:
    """How to go on with the config.yaml of a run or checkpoint that has renamed keys; empty for other files."""
    if path.name != "config.yaml" or not any(moved_keys(values)):
        return ""
    return (
        f"\nIf {path.parent} is a run or checkpoint of an earlier version, upgrade it once: "
        f"python tools/convert.py upgrade {path.parent} --out NEW_FOLDER"
    )


def _walk(value: Any, location: Location, pattern: str) -> Iterator[tuple[Location, str, Any]]:
    """Yield (location, dotted key with ``[]`` for indices, value) of everything inside ``value``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            inner_pattern = f"{pattern}.{key}" if pattern else str(key)
            yield (*location, key), inner_pattern, inner
            yield from _walk(inner, (*location, key), inner_pattern)
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, (*location, index), f"{pattern}[]")


def _indices(location: Location) -> str:
    return "".join(f"[{part}]" for part in location if isinstance(part, int))


def _renamed(value: Any, pattern: str) -> Any:
    if isinstance(value, Mapping):
        renamed = {}
        for key, inner in value.items():
            old = f"{pattern}.{key}" if pattern else str(key)
            new = MOVED_KEYS.get(old, old)
            renamed[new.rpartition(".")[2]] = _renamed(inner, new)
        return renamed
    if isinstance(value, list):
        return [_renamed(inner, f"{pattern}[]") for inner in value]
    return MOVED_VALUES.get(pattern, {}).get(value, value) if isinstance(value, str) else value
