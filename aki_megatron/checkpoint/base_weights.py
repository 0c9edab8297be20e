"""Checkpoints opened as sources of all of a model's weights, whether they hold them or leave frozen ones out.

What a checkpoint leaves out (frozen_record.py) is read from its base: where its run took it from at its start. Every
tensor of a base is compared with the digest in the checkpoint when it is read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.adapters import merge_adapters
from aki_megatron.checkpoint.dcp_io import WEIGHT, CheckpointSource
from aki_megatron.checkpoint.frozen_record import (
    FILE,
    INIT_WEIGHTS,
    FrozenBase,
    FrozenRecord,
    name_some,
    read_record,
    tensor_sha256,
)
from aki_megatron.checkpoint.hf_folders import (
    PretrainedFolder,
    audio_source,
    check_folder,
    language_source,
    vision_source,
)
from aki_megatron.checkpoint.shapes import compare_shapes, model_shapes
from aki_megatron.checkpoint.tensors import TensorSource, TensorSpec, to_native
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.save import load_model
from aki_megatron.errors import BaseWeightsError, CheckpointError, ConfigError

BASE_KEYS = (INIT_WEIGHTS, "init.vision", "init.audio", "init.language")
"""Keys of a run's configuration that name where weights come from."""

BASE_HELP = (
    "where to read the weights that the checkpoint leaves out (checkpoint.exclude_frozen_parameters), if they are not "
    "where its run took them (init.*): a run, a checkpoint or a Hugging Face folder; init.vision=PATH where there are "
    "several, given several times. They must be the same, by sha256"
)
"""Help of the flag ``--base``."""


@dataclass(frozen=True)
class BasePaths:
    """Where bases are now, if they are not where the run took them (--base).

    every   a run or a checkpoint with all that is left out, or the folder of the only base
    by_key  the path of each base by its key
    """

    every: Path | None = None
    by_key: Mapping[str, Path] = field(default_factory=dict)


NO_BASE_PATHS = BasePaths()


def read_base_paths(texts: Sequence[str]) -> BasePaths:
    """Return what ``--base`` was given: PATH, or init.vision=PATH (vision=PATH), several of which may be given.

    Raises ConfigError where two are given for one base.
    """
    every: list[Path] = []
    by_key: dict[str, Path] = {}
    for text in texts:
        key, separator, path = text.partition("=")
        key = key if key.startswith("init.") else f"init.{key}"
        if not separator or key not in BASE_KEYS:
            every.append(Path(text).expanduser())
        elif key in by_key:
            raise ConfigError(f"--base gives {key} twice: {by_key[key]} and {path}; give one of them.")
        else:
            by_key[key] = Path(path).expanduser()
    if len(every) > 1 or (every and by_key):
        raise ConfigError(
            f"--base {' --base '.join(texts)}: give one PATH that holds everything, or one KEY=PATH for each base "
            f"({', '.join(BASE_KEYS)})."
        )
    return BasePaths(every[0] if every else None, by_key)


class BaseTensors:
    """A TensorSource of what a checkpoint leaves out and takes from one base: float32, each tensor with its digest."""

    def __init__(self, checkpoint: Path, key: str, base: FrozenBase, where: str, source: TensorSource) -> None:
        """
        where   the base that was opened, for messages
        source  its weights, at least those of ``base``
        """
        self.where = where
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(each.shape, torch.float32) for name, each in base.tensors.items()
        }
        self._checkpoint = checkpoint
        self._key = key
        self._base = base
        self._source = source

    def get(self, name: str) -> Tensor:
        """Read a tensor. Raises BaseWeightsError where it is not the one that the run began with."""
        tensor = self._source.get(name).float()
        if tensor_sha256(tensor) != self._base.tensors[name].sha256:
            raise BaseWeightsError(
                f"{name} of {self.where} is not what the run of {self._checkpoint} began with "
                f"({self._key}={self._base.path}), and the checkpoint leaves it out: its sha256 is another one. "
                f"{_how_to_give(self._key, self._checkpoint)}"
            )
        return tensor


class WholeCheckpoint:
    """A checkpoint together with what it leaves out: a TensorSource under the names that a CheckpointSource has."""

    def __init__(self, stored: CheckpointSource, bases: Iterable[BaseTensors], prefix: str) -> None:
        """
        bases   what the checkpoint leaves out, by parameter name
        prefix  before the name of a parameter in this source
        """
        self.path = stored.path
        left_out = {prefix + name: (base, name) for base in bases for name in base.specs}
        specs = {name: base.specs[parameter] for name, (base, parameter) in left_out.items()}
        self.specs: Mapping[str, TensorSpec] = {**stored.specs, **specs}
        self._stored = stored
        self._left_out = left_out

    def get(self, name: str) -> Tensor:
        if name not in self._left_out:
            return self._stored.get(name)
        base, parameter = self._left_out[name]
        return base.get(parameter)

    def other_files(self) -> dict[str, Path]:
        """Those of CheckpointSource, without the record of what is left out: for a copy that holds everything."""
        return {name: path for name, path in self._stored.other_files().items() if name != FILE}


def open_source(
    path: Path, *, optimizer_state: bool = False, verify: bool = True, base_paths: BasePaths = NO_BASE_PATHS
) -> CheckpointSource | WholeCheckpoint:
    """Open a checkpoint, or the newest one of a folder or run, with all weights of its model.

    optimizer_state, verify  see CheckpointSource
    base_paths               where the bases are of what the checkpoint leaves out

    Raises CheckpointError as CheckpointSource does; BaseWeightsError where a base is missing or of another model.
    """
    stored = CheckpointSource(path, optimizer_state=optimizer_state, verify=verify)
    record = read_record(stored.path)
    if record is None:
        return stored
    opened = open_bases(stored.path, record, base_paths)
    return WholeCheckpoint(stored, opened.values(), WEIGHT if optimizer_state else "")


def open_bases(checkpoint: Path, record: FrozenRecord, base_paths: BasePaths) -> dict[str, BaseTensors]:
    """Open what a checkpoint leaves out, by the keys of its bases.

    Raises BaseWeightsError where a base is missing, or is of another model.
    """
    if unknown := sorted(base_paths.by_key.keys() - record.bases.keys()):
        raise ConfigError(
            f"--base gives {', '.join(unknown)}, but {checkpoint} takes what it leaves out from "
            f"{', '.join(record.bases)}; give that."
        )
    model = load_model(checkpoint / files.CONFIG)[0]
    opened = {}
    for key, base in record.bases.items():
        path = _find(checkpoint, key, record, base_paths)
        where, source = _open(key, path, base, model)
        found = {name: source.specs[name].shape for name in base.tensors if name in source.specs}
        comparison = compare_shapes(found, {name: each.shape for name, each in base.tensors.items()})
        if wrong := [*comparison.missing, *comparison.mismatched]:
            raise BaseWeightsError(
                f"{where} is of another model than {checkpoint}, which takes from it what it leaves out: "
                f"{name_some(wrong)} are missing or of another shape. {_how_to_give(key, checkpoint)}"
            )
        opened[key] = BaseTensors(checkpoint, key, base, where, source)
    return opened


def find_base_checkpoint(folder: Path, base: FrozenBase | None) -> Path:
    """Return the checkpoint that a run began with, of a run or folder of checkpoints, or the newest where it is gone.

    base  names the checkpoint; None: the newest

    Raises CheckpointError where there is none at all.
    """
    newest = files.find_checkpoint(folder)
    beside = [path for path in reversed(files.list_checkpoints(newest.parent)) if path != newest]
    for path in [newest, *beside] if base is not None and base.manifest_sha256 else []:
        if manifest_sha256(path) == base.manifest_sha256:  # type: ignore[union-attr]
            return path
    return newest


def manifest_sha256(checkpoint: Path) -> str:
    """Return the sha256 of a checkpoint's manifest, which holds those of its other files; empty where it is gone."""
    manifest = checkpoint / files.MANIFEST
    return str(files.file_digest(manifest)["sha256"]) if manifest.is_file() else ""


def open_folder(key: str, path: Path, model: ModelConfig) -> PretrainedFolder:
    """Open the Hugging Face folder that ``init.vision``, ``init.audio`` or ``init.language`` names, and compare it.

    Raises ConfigError where it is of another model; CheckpointError where its tensors are, or cannot be read.
    """
    if key == "init.vision":
        folder = vision_source(path, model.vision)
    elif key == "init.audio":
        assert model.audio is not None
        folder = audio_source(path, model.audio)
    else:
        assert key == "init.language", key
        folder = language_source(path, model.decoder)
    check_folder(folder, model, model_shapes(model))
    return folder


def _open(key: str, path: Path, base: FrozenBase, model: ModelConfig) -> tuple[str, TensorSource]:
    """Return what is opened, for messages, and its weights under the names of our parameters."""
    if not _is_checkpoint(path):
        folder = open_folder(key, path, model)
        return str(path), to_native(folder.tensors, folder.table)
    checkpoint = find_base_checkpoint(path, base if key == INIT_WEIGHTS else None)
    where = str(checkpoint)
    if base.checkpoint and manifest_sha256(checkpoint) != base.manifest_sha256:
        where += f" (not the {base.checkpoint} that the run began with)"
    # each tensor is compared with its digest, which is more than the manifest of the base tells
    return where, merge_adapters(open_source(checkpoint, verify=False), model)


def _find(checkpoint: Path, key: str, record: FrozenRecord, base_paths: BasePaths) -> Path:
    """Return the path of a base. Raises BaseWeightsError that says where it was looked for and how to give it."""
    base = record.bases[key]
    given = base_paths.by_key.get(key, base_paths.every)
    places = [given] if given is not None else list(dict.fromkeys([Path(base.path), Path(base.absolute)]))
    is_of_key = given is None or key in base_paths.by_key or len(record.bases) == 1
    for path in places:
        if _is_checkpoint(path) or (key != INIT_WEIGHTS and path.is_dir() and is_of_key):
            return path
    looked = " and ".join(f"{path}" + ("" if path.is_absolute() else f" in {Path.cwd()}") for path in places)
    count = f"{len(base.tensors)} tensors that its run never trained ({name_some(base.tensors)})"
    raise BaseWeightsError(
        f"{checkpoint} leaves out {count}; they came from {key}={base.path}, which is not there: looked for {looked}. "
        f"{_how_to_give(key, checkpoint)}"
    )


def _how_to_give(key: str, checkpoint: Path) -> str:
    return (
        f"Bring it back, or say where it is: --base {key}=PATH, or --base PATH for a run or checkpoint that holds all "
        f"of it (tools/convert.py, tools/evaluate.py). tools/convert.py reshard {checkpoint} --base PATH --out NEW "
        "writes a checkpoint that holds everything."
    )


def _is_checkpoint(path: Path) -> bool:
    try:
        return (files.find_checkpoint(path) / files.MANIFEST).is_file()
    except CheckpointError:
        return False
