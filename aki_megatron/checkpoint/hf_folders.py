"""Hugging Face folders of SigLIP and of the language models: opened for reading, copied into a stage, written.

Strict: config.json must agree with the run's model section (ConfigError names the keys that do not), and every tensor
must be there with the right shape (CheckpointError lists the others). Only safetensors are read, never a pickle.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from aki_megatron.checkpoint.hf_config import check_language, check_vision, describe_vision
from aki_megatron.checkpoint.readers import open_safetensors
from aki_megatron.checkpoint.tensors import NameTable, TensorFact, TensorSource, View, to_external, to_native
from aki_megatron.checkpoint.weight_names import check_shapes, language_names, model_shapes, vision_names
from aki_megatron.config.model import DecoderConfig, ModelConfig, VisionConfig
from aki_megatron.errors import CheckpointError
from aki_megatron.model.split import cut, split_of
from aki_megatron.model.stage import EMBEDDING_STD, Stage, global_names, seeded
from aki_megatron.model.vision import VisionEncoder

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""The tables of a language model: one row per token."""


@dataclass(frozen=True)
class PretrainedFolder:
    """A folder's tensors under their names, and our names for them."""

    path: Path
    tensors: TensorSource
    """What we use of the folder; tables have the rows of our configuration."""
    table: NameTable
    left_out: tuple[str, ...] = ()
    """Tensors of the folder that no model here uses."""
    grown: tuple[str, ...] = ()
    """Tables of which the folder has fewer rows; the others are drawn."""


def language_source(folder: Path, config: DecoderConfig) -> PretrainedFolder:
    """A language model's folder. Tables that have to grow get rows drawn N(0, 0.02), always the same ones.

    Errors: ConfigError where config.json is of another model; CheckpointError where the weights cannot be read, or
    where tables that should be one are two.
    """
    check_language(folder, config)
    stored = open_safetensors(folder)
    left_out: tuple[str, ...] = ()
    if config.tie_word_embeddings and HEAD in stored.facts:
        # some published folders hold the shared table twice
        if EMBEDDING in stored.facts and not torch.equal(stored.get(HEAD), stored.get(EMBEDDING)):
            raise CheckpointError(
                f"{folder}: config.json says tie_word_embeddings=True, but {HEAD} and {EMBEDDING} differ; "
                "correct config.json."
            )
        left_out = (HEAD,)
    kept = {name: fact for name, fact in stored.facts.items() if name not in left_out}
    fewer = {
        name: kept[name] for name in (EMBEDDING, HEAD) if name in kept and _rows(kept[name]) < config.padded_vocab_size
    }
    grown = {name: TensorFact((config.padded_vocab_size, *fact.shape[1:]), fact.dtype) for name, fact in fewer.items()}

    def maker(name: str) -> Callable[[], Tensor]:
        return lambda: (
            _with_rows(stored.get(name), name, config.padded_vocab_size) if name in grown else stored.get(name)
        )

    tensors = View({**kept, **grown}, {name: maker(name) for name in kept})
    return PretrainedFolder(folder, tensors, language_names(config), left_out, tuple(grown))


def vision_source(folder: Path, config: VisionConfig) -> PretrainedFolder:
    """A SigLIP's folder, whole or its vision part alone.

    Errors: ConfigError where config.json is of another encoder; CheckpointError where the weights cannot be read.
    """
    check_vision(folder, config)
    stored = open_safetensors(folder)
    # published folders and older transformers write the prefix, transformers 5 leaves it out of vision-only folders
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in stored.facts) else ""
    # the text tower of a full SigLIP is not used, nor is the pooling head where the configuration leaves it out
    unused: tuple[str, ...] = ("text_model.", "logit_scale", "logit_bias") if prefix else ()
    unused += () if config.pooling_head else (f"{prefix}head.",)
    kept = {name: fact for name, fact in stored.facts.items() if not name.startswith(unused)}
    tensors = View(kept, {name: lambda name=name: stored.get(name) for name in kept})  # type: ignore[misc]
    left_out = tuple(name for name in stored.facts if name not in kept)
    return PretrainedFolder(folder, tensors, vision_names(config, prefix), left_out)


@torch.no_grad()
def load_pretrained(
    stage: Stage,
    *,
    vision: Path | None = None,
    language: Path | None = None,
    tensor_rank: int = 0,
    tensor_ranks: int = 1,
) -> list[str]:
    """Copy the weights of a SigLIP and/or a language model into a stage, before any engine partitions it.

    Tensors of other stages are left out, and of those that tensor ranks share only this rank's part is kept. One tensor
    of ours is whole in memory at a time. Folders are compared with the whole model, whatever the stage. Returns the
    logical names of the stage's tensors that keep their random values (resampler, added tokens, head bias): no stock
    language model has them. Raises ConfigError or CheckpointError.
    """
    config, own = stage.config, dict(stage.named_parameters())
    here = {logical: own[name] for name, logical in global_names(stage).items()}
    fresh = set(here)
    sources = [] if vision is None else [vision_source(vision, config.vision)]
    sources += [] if language is None else [language_source(language, config.decoder)]
    shapes = model_shapes(config) if sources else {}
    for source in sources:
        check_folder(source, config, shapes)
        ours = to_native(source.tensors, {name: source.table[name] for name in source.table.keys() & here.keys()})
        for name in sorted(ours.facts):
            here[name].copy_(cut(ours.get(name), split_of(name, config.decoder), tensor_rank, tensor_ranks))
        fresh -= ours.facts.keys()
    return sorted(fresh)


def check_folder(source: PretrainedFolder, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a folder's tensors with those that a model of these shapes (by our names) needs of it.

    Errors: CheckpointError with every tensor that is missing, not known, or of another shape.
    """
    ours = View({name: TensorFact(shapes[name], torch.float32) for name in source.table}, {})
    wanted = {name: fact.shape for name, fact in to_external(ours, source.table, config.decoder).facts.items()}
    check_shapes({name: fact.shape for name, fact in source.tensors.facts.items()}, wanted, str(source.path))


def save_vision(encoder: VisionEncoder, config: VisionConfig, folder: Path) -> None:
    """Write an encoder as a Hugging Face folder of a SiglipVisionModel: config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"front.vision.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_file(
        {
            name: state[ours].detach().contiguous().cpu()
            for ours, (name,) in vision_names(config, "vision_model.").items()
        },
        str(folder / "model.safetensors"),
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(describe_vision(config), indent=2, sort_keys=True) + "\n")


def _rows(fact: TensorFact) -> int:
    return fact.shape[0] if fact.shape else 0


def _with_rows(table: Tensor, name: str, rows: int) -> Tensor:
    """A table [rows of the folder, D] with further rows to make ``rows``."""
    with seeded(0, f"grown.{name}"):
        drawn = torch.randn(rows - len(table), table.shape[1]) * EMBEDDING_STD
    return torch.cat([table, drawn.to(table.dtype)])
