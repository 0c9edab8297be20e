"""What ranks do in test_backbones.py; worker processes import this file, which does without transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.checkpoint.hf_config import decoder_config, vision_config
from aki_megatron.checkpoint.initial_weights import load_pretrained
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.config.model import ModelConfig, ResamplerConfig
from aki_megatron.model.stage import build_stage
from aki_megatron.parallel.megatron import build_linears
from aki_megatron.parallel.pipeline_partition import layers_of_stages
from aki_megatron.parallel.topology import Topology
from aki_megatron.types import IGNORE, NO_SEGMENT, Modality, StackedIds

LATENTS, BASE_VOCAB_SIZE = 3, 60
RESAMPLER = ResamplerConfig(num_latents=LATENTS, num_layers=1, num_heads=2, head_dim=8)


@dataclass(frozen=True)
class Inputs:
    """A batch: tokens [B, T], its ids, pixels [N, 3, H, W]."""

    tokens: Tensor
    ids: StackedIds
    pixels: Tensor


def text_ids(tokens: Tensor, lengths: Sequence[int] = (), targets: Tensor | None = None) -> StackedIds:
    """Ids of right-padded sequences of text, tokens [B, T]; by default without padding and without targets."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    valid = positions < torch.tensor(lengths or [tokens.shape[1]] * len(tokens))[:, None]
    segments = torch.zeros_like(tokens).where(valid, NO_SEGMENT)
    modality_ids = torch.full_like(tokens, Modality.TEXT).where(valid, Modality.PAD)
    return StackedIds.stack(
        modality_ids, segments, positions, torch.full_like(tokens, IGNORE) if targets is None else targets
    )


def model_of(language: Path, vision: Path) -> ModelConfig:
    """The model that two folders describe."""
    decoder = decoder_config(language, vocab_size=BASE_VOCAB_SIZE, num_added_tokens=2)
    return ModelConfig(vision=vision_config(vision), resampler=RESAMPLER, decoder=decoder)


@torch.no_grad()
def rank_logits(
    topology: Topology, languages: Mapping[str, Path], vision: Path, inputs: Inputs
) -> dict[str, Tensor] | None:
    """Logits of this rank's vocabulary shard, for every folder by name; None on all stages but the last."""
    found: dict[str, Tensor] = {}
    for name, language in languages.items():
        config = model_of(language, vision)
        partition = layers_of_stages(config, num_stages=topology.pipeline, layers_per_stage=(), text_tokens=16)
        layers, linears = partition[topology.pipeline_rank], build_linears(topology)
        stage = build_stage(config, layers, attention=AttentionConfig(rule="causal"), linears=linears)
        load_pretrained(
            stage,
            vision=vision,
            language=language,
            tensor_rank=topology.tensor_rank,
            tensor_ranks=topology.tensor,
        )
        hidden = inputs.tokens
        if stage.input_embedder is None:
            hidden = torch.empty(*inputs.tokens.shape, config.decoder.hidden_size)
            dist.recv(hidden, topology.peer(topology.pipeline_rank - 1))
        if stage.lm_head is None:
            dist.send(
                stage(hidden, inputs.ids, {Modality.IMAGE: inputs.pixels}), topology.peer(topology.pipeline_rank + 1)
            )
        else:
            found[name] = stage.logits(hidden, inputs.ids, {Modality.IMAGE: inputs.pixels})
    return found if topology.pipeline_rank == topology.pipeline - 1 else None
