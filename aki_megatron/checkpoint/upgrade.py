"""Checkpoints of format 1, converted once to the current format: names change, and no number does.

Format 1 named the tensors, the configuration keys and the training state otherwise.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.conversion_report import ConversionReport, external_records
from aki_megatron.checkpoint.conversion_steps import ConversionSettings, default_num_files, prepare
from aki_megatron.checkpoint.dcp_io import PARAMETER_PREFIXES, WEIGHT, CheckpointSource, write_checkpoint
from aki_megatron.checkpoint.shapes import check_shapes, model_shapes
from aki_megatron.checkpoint.tensors import to_native
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.moved_keys import rename_moved
from aki_megatron.config.save import load_model
from aki_megatron.config.yaml_file import read_yaml

FROM_FORMAT = 1

TENSOR_PREFIXES = {
    "front.vision.pooling.": "input_embedder.vision_encoder.pooling_head.",
    "front.vision.blocks.": "input_embedder.vision_encoder.layers.",
    "front.vision.": "input_embedder.vision_encoder.",
    "front.resampler.blocks.": "input_embedder.resampler.layers.",
    "front.resampler.": "input_embedder.resampler.",
    "front.embedding.table.": "input_embedder.token_embedding.base.",
    "front.embedding.extra": "input_embedder.token_embedding.added_tokens",
    "blocks.": "layers.",
    "head.output.": "lm_head.base.",
    "head.extra.": "lm_head.added_tokens.",
    "head.norm.": "lm_head.norm.",
}
"""Start of a parameter name in format 1 -> the current one; the first that matches applies."""

TENSOR_SEGMENTS = {
    "attention.qkv": "attention.qkv_proj",
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.key_value": "attention.kv_proj",
    "attention.out": "attention.out_proj",
    "attention.query_norm": "attention.q_norm",
    "attention.key_norm": "attention.k_norm",
    "feed_forward_norm": "mlp_norm",
    "feed_forward.gate_up": "mlp.gate_up_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
    "feed_forward.norm": "mlp.norm",
}
"""Module names inside a parameter name in format 1 -> the current ones."""

EXTRA_KEYS = {
    "judge": "loss_spike_guard",
    "norms": "grad_norms",
    "spikes_in_a_row": "consecutive_spikes",
    "row": "sequence",
}
"""Key of the training state in format 1, at any depth -> the current one."""

DATA_STATE_VERSION = 2
"""Version of the data state that EXTRA_KEYS make of version 1."""

_SEGMENT = re.compile(r"(?<=\.)(" + "|".join(re.escape(old) for old in TENSOR_SEGMENTS) + r")(?=\.)")


def upgrade(old: Path, folder: Path, settings: ConversionSettings, *, out: Path) -> ConversionReport:
    """Write a checkpoint of format 1 in the current format, bit for bit, with everything it holds.

    old     a checkpoint, a folder of checkpoints or a run folder (its newest checkpoint is taken)
    folder  a staging_dir of the caller, which becomes ``out``. For a run folder it becomes one too: the checkpoint lies
            in its folder checkpoints, beside a config.yaml from which the run can be resumed

    Raises CheckpointError when there is no intact checkpoint of format 1, or when its weights under their new names are
    not those of the model that its config.yaml describes; ConfigError when that file describes no model.
    """
    source = CheckpointSource(old, optimizer_state=True, version=FROM_FORMAT)
    new_names = {name: upgraded_name(name) for name in source.specs}
    tensors = to_native(source, {new: (name,) for name, new in new_names.items()})
    weights = {name.removeprefix(WEIGHT): spec.shape for name, spec in tensors.specs.items() if name.startswith(WEIGHT)}
    config_yaml = _dump(_upgraded_values(source.path / files.CONFIG))
    check_shapes(weights, model_shapes(_read_model(config_yaml)), str(source.path))
    is_run = source.path.parent == old / files.CHECKPOINTS and (old / files.CONFIG).is_file()
    if is_run:
        values = _upgraded_values(old / files.CONFIG)
        files.write_text(folder / files.CONFIG, _dump(values | {"run": values["run"] | {"dir": str(out)}}))
    write_checkpoint(
        folder / files.CHECKPOINTS if is_run else folder,
        files.step_of(source.path),
        prepare(tensors, settings, "writing the checkpoint"),
        config_yaml=config_yaml,
        attach=source.other_files() | {files.EXTRA: _upgraded_extra(source.path / files.EXTRA)},
        num_files=settings.num_files or default_num_files(tensors),
    )
    records = external_records(source, {name: (new,) for name, new in new_names.items()})
    report = ConversionReport("upgrade", {"checkpoint": str(source.path)}, records)
    if is_run:
        report.notes["resume"] = f"start the run again with --config {out / files.CONFIG}"
    return report


def upgraded_name(stored: str) -> str:
    """The current name of a stored tensor of format 1: ``weight.layers.0.mlp_norm.weight``."""
    kind = next((prefix for prefix in PARAMETER_PREFIXES if stored.startswith(prefix)), None)
    if kind is None:
        return stored
    name = stored.removeprefix(kind)
    prefix = next((prefix for prefix in TENSOR_PREFIXES if name.startswith(prefix)), "")
    name = TENSOR_PREFIXES.get(prefix, "") + name.removeprefix(prefix)
    return kind + _SEGMENT.sub(lambda match: TENSOR_SEGMENTS[match.group()], name)


def _upgraded_values(config: Path) -> dict[str, Any]:
    return rename_moved(read_yaml(config).values)


def _dump(values: Mapping[str, Any]) -> str:
    dumped = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)
    return "# Upgraded from an earlier version's configuration.\n" + dumped


def _read_model(config_yaml: str) -> ModelConfig:
    with TemporaryDirectory() as folder:
        path = Path(folder) / files.CONFIG
        path.write_text(config_yaml, encoding="utf-8")
        return load_model(path)[0]


def _renamed(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {EXTRA_KEYS.get(key, key): _renamed(inner) for key, inner in value.items()}


def _upgraded_extra(path: Path) -> bytes:
    """extra.json of format 1, under the current keys."""
    content = json.loads(path.read_text(encoding="utf-8"))
    extra = _renamed(content["extra"])
    if "version" in extra.get("data", {}):
        extra["data"]["version"] = DATA_STATE_VERSION
    return json.dumps({"extra": extra, "rng_states": content["random"]}, indent=1).encode()
