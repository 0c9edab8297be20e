"""The modalities a model reads: for each an encoder and a resampler, in one registry.

N items, L features of one item, W width of the features, Q latents per item, D hidden size of the decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from aki_megatron.config.model import AudioConfig, ModelConfig
from aki_megatron.model.audio import AudioEncoder
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
    is_part          whether a model has this modality
    """

    encoder_name: str
    resampler_name: str
    build_encoder: Callable[[ModelConfig], nn.Module]
    build_resampler: Callable[[ModelConfig], nn.Module]
    item_shape: Callable[[ModelConfig], tuple[int, ...]]
    num_latents: Callable[[ModelConfig], int]
    is_part: Callable[[ModelConfig], bool] = lambda config: True


def _build_image_resampler(config: ModelConfig) -> nn.Module:
    return PerceiverResampler(config.resampler, config.vision.hidden_size, config.decoder.hidden_size)


def _audio(config: ModelConfig) -> AudioConfig:
    assert config.audio is not None
    return config.audio


def _build_audio_resampler(config: ModelConfig) -> nn.Module:
    audio = _audio(config)
    return PerceiverResampler(audio.resampler, audio.hidden_size, config.decoder.hidden_size)


MEDIA_ENCODERS: dict[Modality, MediaEncoder] = {
    Modality.IMAGE: MediaEncoder(
        encoder_name="vision_encoder",
        resampler_name="resampler",
        build_encoder=lambda config: VisionEncoder(config.vision),
        build_resampler=_build_image_resampler,
        item_shape=lambda config: (3, config.vision.image_size, config.vision.image_size),
        num_latents=lambda config: config.resampler.num_latents,
    ),
    Modality.AUDIO: MediaEncoder(
        encoder_name="audio_encoder",
        resampler_name="audio_resampler",
        build_encoder=lambda config: AudioEncoder(_audio(config)),
        build_resampler=_build_audio_resampler,
        item_shape=lambda config: (_audio(config).num_mel_bins, _audio(config).num_frames),
        num_latents=lambda config: _audio(config).resampler.num_latents,
        is_part=lambda config: config.audio is not None,
    ),
}
"""Every modality that has an encoder. The names are those of checkpoints and seeds: do not change them."""


def media_encoders(config: ModelConfig) -> dict[Modality, MediaEncoder]:
    """Return the encoders of a model, in the order of their modalities."""
    return {modality: media for modality, media in MEDIA_ENCODERS.items() if media.is_part(config)}
