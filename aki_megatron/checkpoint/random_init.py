"""The tensors a new model starts with, drawn part by part: what a conversion gives a tensor that its source lacks."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from aki_megatron.checkpoint.tensors import TensorFact
from aki_megatron.checkpoint.weight_names import model_shapes
from aki_megatron.config.model import ModelConfig
from aki_megatron.model.decoder import Block
from aki_megatron.model.linears import LocalLinears
from aki_megatron.model.resampler import PerceiverResampler
from aki_megatron.model.stage import Head, TokenEmbedding, seeded
from aki_megatron.model.vision import VisionEncoder

PARTS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "front.vision": lambda config: VisionEncoder(config.vision),
    "front.resampler": lambda config: PerceiverResampler(
        config.resampler, config.vision.hidden_size, config.decoder.hidden_size
    ),
    "front.embedding": lambda config: TokenEmbedding(config.decoder, LocalLinears()),
    "blocks": lambda config: Block(config.decoder, LocalLinears()),
    "head": lambda config: Head(config.decoder, LocalLinears()),
}
"""Parts that model/stage.py seeds by themselves."""


class Drawn:
    """The new weights of a run with this seed, float32; one part is in memory at a time. See TensorSource."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.facts: Mapping[str, TensorFact] = {
            name: TensorFact(shape, torch.float32) for name, shape in model_shapes(config).items()
        }
        self._part = ""
        self._tensors: Mapping[str, Tensor] = {}

    def get(self, name: str) -> Tensor:
        """See TensorSource.get."""
        kind = next(kind for kind in PARTS if name.startswith(f"{kind}."))
        part = ".".join(name.split(".")[:2]) if kind == "blocks" else kind
        if part != self._part:
            self._tensors = {}  # before the next part is drawn
            with seeded(self.seed, part):
                self._tensors = PARTS[kind](self.config).state_dict()
            self._part = part
        return self._tensors[name.removeprefix(f"{part}.")]
