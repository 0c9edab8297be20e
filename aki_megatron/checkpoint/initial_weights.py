"""The weights that a run starts from, copied into the stages of each rank: a checkpoint, or public pretrained folders.

Each rank reads the tensors of its own stages and keeps its tensor-parallel shard of them. One tensor is whole in memory
at a time.
"""

import logging
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from aki_megatron.checkpoint import files
from aki_megatron.checkpoint.adapters import merge_adapters
from aki_megatron.checkpoint.base_weights import NO_BASE_PATHS, BasePaths, open_source
from aki_megatron.checkpoint.collectives import RankGroup
from aki_megatron.checkpoint.hf_folders import audio_source, check_folder, language_source, vision_source
from aki_megatron.checkpoint.shapes import check_shapes, model_shapes
from aki_megatron.checkpoint.tensors import StoredTensors, TensorSource, select, to_native
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.run import InitConfig
from aki_megatron.model.sharding import shard_spec, shard_tensor
from aki_megatron.model.stage import Stage, global_names
from aki_megatron.parallel.topology import Topology

logger = logging.getLogger(__name__)


@torch.no_grad()
def copy_weights(stage: Stage, source: TensorSource, *, tensor_rank: int = 0, tensor_ranks: int = 1) -> set[str]:
    """Copy into a stage every tensor of ``source`` that belongs to it, as tensor rank ``tensor_rank`` holds it.

    source  whole tensors by the parameter names of the whole model (global_names)

    Returns the names that were copied.
    """
    parameters = dict(stage.named_parameters())
    local = {name: parameters[own] for own, name in global_names(stage).items()}
    names = local.keys() & source.specs.keys()
    for name in sorted(names):
        spec = shard_spec(name, stage.config.decoder)
        local[name].copy_(shard_tensor(source.get(name), spec, tensor_rank, tensor_ranks))
    return names


def open_weights(checkpoint: Path, model: ModelConfig, base_paths: BasePaths = NO_BASE_PATHS) -> StoredTensors:
    """The weights of a checkpoint, or of the newest one in a folder of checkpoints or a run folder; collective.

    Low-rank adapters are merged into the weights they belong to.

    base_paths  where the bases are of what the checkpoint leaves out

    Raises CheckpointError on every rank where there is no intact checkpoint, or with every tensor that is missing,
    unexpected, or of another shape than in ``model``.
    """
    ranks = RankGroup()
    path = ranks.run_on_all(lambda: files.find_checkpoint(checkpoint))
    ranks.verify_checkpoint(path)
    source = ranks.run_on_all(lambda: merge_adapters(open_source(path, verify=False, base_paths=base_paths), model))
    check_shapes({name: spec.shape for name, spec in source.specs.items()}, model_shapes(model), str(path))
    return source


def load_weights(model: Stage, checkpoint: Path, base_paths: BasePaths = NO_BASE_PATHS) -> None:
    """Copy every weight of a checkpoint, or of the newest one of a run folder, into a whole model; collective.

    Raises CheckpointError as ``open_weights`` does.
    """
    copy_weights(model, open_weights(checkpoint, model.config, base_paths))


def load_pretrained(
    stage: Stage,
    *,
    vision: Path | None = None,
    audio: Path | None = None,
    language: Path | None = None,
    names: Collection[str] | None = None,
    tensor_rank: int = 0,
    tensor_ranks: int = 1,
) -> list[str]:
    """Copy the weights of a SigLIP folder, a Whisper folder, a language model's folder, or several into a stage.

    Call it before an engine partitions the stage. Folders are compared with the whole model, whatever the stage holds.

    names  of the parameters to copy; None: all that the folders hold

    Returns the names of the stage's tensors that keep their random values (resamplers, added tokens, head bias),
    because no stock model has them.

    Raises ConfigError where config.json disagrees with the stage's configuration; CheckpointError where the tensors do,
    or where they cannot be read.
    """
    config, remaining = stage.config, set(global_names(stage).values())
    folders = [] if vision is None else [vision_source(vision, config.vision)]
    if audio is not None:
        assert config.audio is not None
        folders.append(audio_source(audio, config.audio))
    folders += [] if language is None else [language_source(language, config.decoder)]
    shapes = model_shapes(config) if folders else {}
    for folder in folders:
        check_folder(folder, config, shapes)
        if folder.extended:
            tables = " and ".join(folder.extended)
            logger.info("%s: rows for added tokens: %s extended %s", folder.path, tables, folder.growth_note)
        source = _selected(to_native(folder.tensors, folder.table), names)
        remaining -= copy_weights(stage, source, tensor_rank=tensor_rank, tensor_ranks=tensor_ranks)
    return sorted(remaining)


def weight_initializer(
    init: InitConfig, model: ModelConfig, topology: Topology, *, names: Collection[str] | None = None
) -> Callable[[Stage], None]:
    """A function that overwrites a new stage's random weights with those the run starts from; collective.

    It leaves the stage alone where the run starts from random weights.

    names  of the parameters to overwrite, for a run that resumes: none but those that its checkpoint leaves out; None:
           all
    """
    shard = {"tensor_rank": topology.tensor_rank, "tensor_ranks": topology.tensor}
    if names == frozenset() or all(part is None for part in (init.weights, init.vision, init.audio, init.language)):
        return lambda _stage: None
    if init.weights is not None:
        source = _selected(open_weights(init.weights, model), names)

        def copy(stage: Stage) -> None:
            copy_weights(stage, source, **shard)

        return copy
    folders = {"vision": init.vision, "audio": init.audio, "language": init.language}

    def init_weights(stage: Stage) -> None:
        random = load_pretrained(stage, **folders, names=names, **shard)  # type: ignore[arg-type]
        if names is None:
            logger.info("random initialization of %d tensors: %s", len(random), ", ".join(random))

    return init_weights


def _selected(source: TensorSource, names: Collection[str] | None) -> TensorSource:
    """The named tensors of a source that it holds; the source itself where ``names`` is None."""
    return source if names is None else select(source, [name for name in source.specs if name in names])
