"""The modalities a model reads: for each an encoder and a resampler, in one registry.

N items, L features of one item, W width of the features, Q latents per item, D hidden size of the decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from aki_megatron.config.model import ModelConfig
from aki_megatron.model.resampler import PerceiverResampler
from aki_megatron.model.vision import VisionEncoder
from aki_megatron.types import Modality


@dataclass(frozen=True)
class MediaEncoder:
    """How items of one modality become embeddings of the decoder.

    encoder_name     attribute of InputEmbedder: [N, ...] float -> features [N, L, W]
    resampler_name   attribute of InputEmbedder: features [N, L, W] -> [N, Q, D]
    build_encoder    randomly initialized
    build_resampler  likewise
    item_shape       shape of one item as the encoder takes it
    num_latents      Q
    """

    encoder_name: str
    resampler_name: str
    build_encoder: Callable[[ModelConfig], nn.Module]
    build_resampler: Callable[[ModelConfig], nn.Module]
    item_shape: Callable[[ModelConfig], tuple[int, ...]]
    num_latents: Callable[[ModelConfig], int]


def _build_image_resampler(config: ModelConfig) -> nn.Module:
    return PerceiverResampler(config.resampler, config.vision.hidden_size, config.decoder.hidden_size)


MEDIA_ENCODERS: dict[Modality, MediaEncoder] = {
    Modality.IMAGE: MediaEncoder(
        encoder_name="vision_encoder",
        resampler_name="resampler",
        build_encoder=lambda config: VisionEncoder(config.vision),
        build_resampler=_build_image_resampler,
        item_shape=lambda config: (3, config.vision.image_size, config.vision.image_size),
        num_latents=lambda config: config.resampler.num_latents,
    ),
}
"""Every modality that has an encoder. The names are those of checkpoints and seeds: do not change them."""


def media_encoders(config: ModelConfig) -> dict[Modality, MediaEncoder]:
    """Return the encoders of a model, in the order of their modalities."""
    return MEDIA_ENCODERS
