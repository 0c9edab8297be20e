"""What a path holds (our checkpoints, Hugging Face folders, the official release), and whether its files are intact."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.base_weights import NO_BASE_PATHS, BasePaths, open_bases
from aki_megatron.checkpoint.conversion_report import REPORT, layer_pattern
from aki_megatron.checkpoint.dcp_io import WEIGHT, CheckpointSource
from aki_megatron.checkpoint.frozen_record import read_record
from aki_megatron.checkpoint.official import PREFIXES as OFFICIAL
from aki_megatron.checkpoint.official import open_official
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.checkpoint.tensors import TensorSpec
from aki_megatron.errors import CheckpointError

OPTIMIZER_STATE = "optimizer state"
"""The component of a checkpoint's tensors that are not parameters."""

FORMATS: dict[str, dict[str, str]] = {
    "checkpoint of aki_megatron": {
        f"{WEIGHT}input_embedder.vision_encoder.": "vision encoder",
        f"{WEIGHT}input_embedder.resampler.": "resampler",
        f"{WEIGHT}input_embedder.audio_encoder.": "audio encoder",
        f"{WEIGHT}input_embedder.audio_resampler.": "audio resampler",
        WEIGHT: "decoder",
        "": OPTIMIZER_STATE,
    },
    "official AKI release": dict(zip(OFFICIAL, ("vision encoder", "resampler", "decoder"), strict=True)),
    "AKI for transformers": {"model.vision_tower.": "vision encoder", "model.resampler.": "resampler", "": "decoder"},
    "SigLIP": {"text_model.": "text tower", "logit_": "text tower", "": "vision encoder"},
    "language model": {"": "decoder"},
}
"""Format -> name prefix -> component of the model; the first matching prefix counts."""

_DISTINCTIVE_PREFIXES = {
    "official AKI release": OFFICIAL,
    "AKI for transformers": ("model.vision_tower.",),
    "SigLIP": ("vision_model.", "embeddings.patch_embedding."),
    "language model": ("model.embed_tokens.",),
}
"""Format -> prefixes of names that tell it from the formats after it."""


@dataclass(frozen=True)
class TensorListing:
    """The tensors at a path."""

    format: str
    path: Path
    specs: Mapping[str, TensorSpec]

    def component(self, name: str) -> str:
        """The component of the model that a tensor belongs to."""
        prefixes = FORMATS[self.format]
        return next((component for prefix, component in prefixes.items() if name.startswith(prefix)), "other")

    def by_component(self) -> dict[str, list[TensorSpec]]:
        """The tensors of each component."""
        found: dict[str, list[TensorSpec]] = {}
        for name, spec in self.specs.items():
            found.setdefault(self.component(name), []).append(spec)
        return found

    @property
    def num_parameters(self) -> int:
        """Number of elements of all parameters."""
        return sum(spec.numel for name, spec in self.specs.items() if self.component(name) != OPTIMIZER_STATE)

    def by_layer_pattern(self) -> Iterator[tuple[str, TensorSpec, int]]:
        """Names with ``{i}`` for the layer number, the spec of each, and the number of layers that have it."""
        counts: dict[tuple[str, TensorSpec], int] = {}
        for name, spec in self.specs.items():
            key = (layer_pattern(name), spec)
            counts[key] = counts.get(key, 0) + 1
        yield from ((name, spec, count) for (name, spec), count in counts.items())


def list_tensors(path: Path) -> TensorListing:
    """List a checkpoint (or the newest of a folder or run), a Hugging Face folder, or the official release.

    Of a checkpoint that leaves out what its run never trained, this is listed too.

    Raises CheckpointError for anything else, and for files that cannot be read.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if path.is_dir() and not list(path.glob("*.safetensors")):
        source = CheckpointSource(path, optimizer_state=True, verify=False)
        record = read_record(source.path)
        left_out = {} if record is None else record.tensors
        elsewhere = {WEIGHT + name: TensorSpec(each.shape, torch.float32) for name, each in left_out.items()}
        return TensorListing("checkpoint of aki_megatron", source.path, {**source.specs, **elsewhere})
    specs = (open_safetensors(path) if path.is_dir() or path.suffix == ".safetensors" else open_official(path)).specs
    for title, prefixes in _DISTINCTIVE_PREFIXES.items():
        if any(name.startswith(prefixes) for name in specs):
            return TensorListing(title, path, specs)
    raise CheckpointError(f"{path} holds tensors of no format known here; the first is {next(iter(specs), 'none')}.")


def left_out_lines(checkpoint: Path, base_paths: BasePaths = NO_BASE_PATHS) -> list[str]:
    """Return a line for each base of what a checkpoint leaves out; nothing for a checkpoint that is whole.

    base_paths  where the bases are

    Raises CheckpointError where one is missing, or is of another model.
    """
    record = read_record(checkpoint)
    if record is None:
        return []
    lines = []
    for key, opened in open_bases(checkpoint, record, base_paths).items():
        numel, size = (sum(getattr(spec, what) for spec in opened.specs.values()) for what in ("numel", "nbytes"))
        lines.append(
            f"not in the checkpoint, but read from {opened.where} ({key}): {len(opened.specs)} tensors, {numel:,} "
            f"parameters, {size / 1e6:,.1f} MB"
        )
    return lines


def verify_files(path: Path, report: Callable[[str], None]) -> bool:
    """Compare every file with the sha256 in the folder's conversion.json, or in a checkpoint's manifest of any format.

    Report one line per file, and return whether all agree. Raises CheckpointError where there is neither.
    """
    if path.is_dir() and (path / REPORT).is_file():
        folder = path
        try:
            listed = dict(json.loads((path / REPORT).read_text(encoding="utf-8"))["outputs"])
        except (ValueError, KeyError, TypeError):
            raise CheckpointError(f"{path / REPORT} is corrupt; give the checkpoint inside the folder.") from None
    else:
        folder = files.find_checkpoint(path)
        listed = files.read_manifest(folder, version=None)
    num_intact = 0
    for name in sorted(listed):
        damage = files.find_damage(folder, [name], listed)
        report(damage or f"{listed[name]['sha256']}  {name}")
        num_intact += damage is None
    report(f"{num_intact} of {len(listed)} files are intact")
    return num_intact == len(listed)
