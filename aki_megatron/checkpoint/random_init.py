"""The random weights of a new model as a source of tensors, for tensors that a conversion's own source lacks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from aki_megatron.checkpoint.shapes import model_shapes
from aki_megatron.checkpoint.tensors import TensorSpec
from aki_megatron.config.model import ModelConfig
from aki_megatron.model.decoder import DecoderLayer
from aki_megatron.model.init import seeded
from aki_megatron.model.linears import LocalLinears
from aki_megatron.model.media_encoders import MEDIA_ENCODERS
from aki_megatron.model.stage import LMHead, TokenEmbedding

MODULES: dict[str, Callable[[ModelConfig], nn.Module]] = {
    **{f"input_embedder.{media.encoder_name}": media.build_encoder for media in MEDIA_ENCODERS.values()},
    **{f"input_embedder.{media.resampler_name}": media.build_resampler for media in MEDIA_ENCODERS.values()},
    "input_embedder.token_embedding": lambda config: TokenEmbedding(config.decoder, LocalLinears()),
    "layers": lambda config: DecoderLayer(config.decoder, LocalLinears()),
    "lm_head": lambda config: LMHead(config.decoder, LocalLinears()),
}
"""Modules that build_stage seeds one by one; every decoder layer has a seed of its own."""


class RandomInitSource:
    """A TensorSource of the float32 weights that a run with this seed starts from; one module in memory at a time."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(shape, torch.float32) for name, shape in model_shapes(config).items()
        }
        self._module = ""
        self._tensors: Mapping[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        kind = next(kind for kind in MODULES if name.startswith(f"{kind}."))
        module = ".".join(name.split(".")[:2]) if kind == "layers" else kind
        if module != self._module:
            self._tensors = {}  # free the previous module first
            with seeded(self.seed, module):
                self._tensors = MODULES[kind](self.config).state_dict()
            self._module = module
        return self._tensors[name.removeprefix(f"{module}.")]
