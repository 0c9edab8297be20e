"""The weights a run starts from: each rank reads those of its own stages and keeps its tensor rank's part of them."""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from aki_megatron.checkpoint.checkpointer import SavedWeights
from aki_megatron.checkpoint.hf_folders import load_pretrained
from aki_megatron.config.model import ModelConfig
from aki_megatron.config.run import RunConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.split import cut, split_of
from aki_megatron.model.stage import Stage, build_model, global_names
from aki_megatron.parallel.topology import Topology

logger = logging.getLogger("aki_megatron.train")


def whole_parameters(model: ModelConfig) -> dict[str, nn.Parameter]:
    """Every parameter of the whole model by its logical name; they have shapes and no memory."""
    with torch.device("meta"):
        return dict(build_model(model, rule="causal").named_parameters())


def open_weights(checkpoint: Path, model: ModelConfig) -> SavedWeights:
    """The weights of a checkpoint (or of the newest one of a run folder), proven to be those of this model.

    All ranks call it together. Errors: CheckpointError where there is none, or with the names that do not fit.
    """
    saved = SavedWeights(checkpoint)
    wanted = {name: tuple(parameter.shape) for name, parameter in whole_parameters(model).items()}
    wrong = [
        f"{name}: {saved.shapes.get(name, 'missing')} in the checkpoint, {wanted.get(name, 'missing')} in the model"
        for name in sorted(wanted.keys() | saved.shapes.keys())
        if wanted.get(name) != saved.shapes.get(name)
    ]
    if wrong:
        listing = "\n  ".join(wrong[:10])
        raise CheckpointError(f"{checkpoint} is of another model ({len(wrong)} tensors differ):\n  {listing}")
    return saved


@torch.no_grad()
def copy_weights(stage: Stage, saved: SavedWeights, *, tensor_rank: int = 0, tensor_ranks: int = 1) -> None:
    """Fill a stage, as this tensor rank holds it, from weights of its model."""
    own = dict(stage.named_parameters())
    here = {logical: own[name] for name, logical in global_names(stage).items()}
    for name, whole in saved.read(here):
        here[name].copy_(cut(whole, split_of(name, stage.config.decoder), tensor_rank, tensor_ranks))


def load_weights(model: Stage, checkpoint: Path) -> None:
    """Copy every weight of a checkpoint (or of the newest one of a run folder) into a whole model.

    Errors: CheckpointError where there is none, or with the names that do not fit.
    """
    copy_weights(model, open_weights(checkpoint, model.config))


def weight_source(config: RunConfig, topology: Topology, *, resuming: bool) -> Callable[[Stage], None]:
    """What puts the weights the run starts from into a new stage of this rank.

    A run that resumes gets them from its checkpoint later. All ranks call this together.
    """
    init = config.init
    share = {"tensor_rank": topology.tensor_rank, "tensor_ranks": topology.tensor}
    if resuming or (init.weights is None and init.vision is None and init.language is None):
        return lambda _stage: None
    if init.weights is not None:
        saved = open_weights(init.weights, config.model)
        return lambda stage: copy_weights(stage, saved, **share)

    def fill(stage: Stage) -> None:
        fresh = load_pretrained(stage, vision=init.vision, language=init.language, **share)
        logger.info("random initialization of %d tensors: %s", len(fresh), ", ".join(fresh))

    return fill
