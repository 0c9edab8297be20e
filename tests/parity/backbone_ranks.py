"""What ranks do in test_backbones.py; worker processes import this file, which does without transformers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from aki_megatron.checkpoint.hf_config import decoder_config, vision_config
from aki_megatron.checkpoint.hf_folders import load_pretrained
from aki_megatron.config.model import ModelConfig, ResamplerConfig
from aki_megatron.model.stage import build_stage
from aki_megatron.parallel.megatron import build_linears
from aki_megatron.parallel.pipeline_partition import stage_layers
from aki_megatron.parallel.topology import Topology

LATENTS, BASE_TOKENS = 3, 60
RESAMPLER = ResamplerConfig(num_latents=LATENTS, num_layers=1, num_heads=2, head_dim=8)


@dataclass(frozen=True)
class Inputs:
    """A batch: token ids [B, T], ids [B, T, 4], pixels [N, 3, H, W]."""

    tokens: Tensor
    ids: Tensor
    pixels: Tensor


def model_of(language: Path, vision: Path) -> ModelConfig:
    """The model that two folders describe."""
    decoder = decoder_config(language, vocab_size=BASE_TOKENS, num_added_tokens=2)
    return ModelConfig(vision=vision_config(vision), resampler=RESAMPLER, decoder=decoder)


@torch.no_grad()
def rank_logits(
    topology: Topology, languages: Mapping[str, Path], vision: Path, inputs: Inputs
) -> dict[str, Tensor] | None:
    """Logits of this rank's words for every folder by name; None on all stages but the last."""
    found: dict[str, Tensor] = {}
    for name, language in languages.items():
        config = model_of(language, vision)
        layers = stage_layers(config, stages=topology.pipeline, layers_per_stage=(), text_tokens=16)
        stage = build_stage(config, layers[topology.pipeline_rank], rule="causal", linears=build_linears(topology))
        load_pretrained(
            stage,
            vision=vision,
            language=language,
            tensor_rank=topology.tensor_rank,
            tensor_ranks=topology.tensor,
        )
        hidden = inputs.tokens
        if stage.front is None:
            hidden = torch.empty(*inputs.tokens.shape, config.decoder.hidden_size)
            dist.recv(hidden, topology.peer(topology.pipeline_rank - 1))
        if stage.head is None:
            dist.send(stage(hidden, inputs.ids, inputs.pixels), topology.peer(topology.pipeline_rank + 1))
        else:
            found[name] = stage.logits(hidden, inputs.ids, inputs.pixels)
    return found if topology.pipeline_rank == topology.pipeline - 1 else None
