"""The modalities that the data hold: for each a decoder, and how its decoded items become the encoder's input.

The model's side is aki_megatron/model/media_encoders.py.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from aki_megatron.config.model import ModelConfig
from aki_megatron.data.audio import AudioDecoder, stack_audio
from aki_megatron.data.image import MAX_PIXELS, OFFICIAL_OPTIONS, ImageCache, ImageOptions
from aki_megatron.types import DecodedAudio, DecodedImage, MediaItem, Modality


class MediaDecoder(Protocol):
    """Decodes the items of one modality."""

    def decode(
        self, content: Path | bytes, *, key: str, augment_seed: int | None = None
    ) -> DecodedImage | DecodedAudio:
        """Decode a file or its bytes; ``key`` names the sample in errors, a seed augments where that is defined.

        Raises DataError, whatever goes wrong.
        """
        ...


Decoders = Mapping[Modality, MediaDecoder]
"""The decoders of a model's modalities."""


def media_decoders(
    model: ModelConfig, options: ImageOptions = OFFICIAL_OPTIONS, *, max_pixels: int = MAX_PIXELS
) -> dict[Modality, MediaDecoder]:
    """Return a decoder for every modality of a model; an image of more than ``max_pixels`` is refused."""
    decoders: dict[Modality, MediaDecoder] = {
        Modality.IMAGE: ImageCache(model.vision.image_size, options, max_pixels=max_pixels)
    }
    if model.audio is not None:
        decoders[Modality.AUDIO] = AudioDecoder(model.audio)
    return decoders


def num_media_tokens(model: ModelConfig) -> dict[Modality, int]:
    """Return the positions of one item of every modality of a model."""
    counts = {Modality.IMAGE: model.resampler.num_latents}
    if model.audio is not None:
        counts[Modality.AUDIO] = model.audio.resampler.num_latents
    return counts


def decode_item(item: MediaItem, decoders: Decoders, key: str, augment_seed: int | None = None) -> MediaItem:
    """Return an item decoded. Raises DataError."""
    assert isinstance(item.content, Path | bytes), key
    decoded = decoders[item.modality].decode(item.content, key=key, augment_seed=augment_seed)
    return MediaItem(item.modality, decoded)


STACKS: Mapping[Modality, Callable[[Sequence[Any]], Tensor]] = {Modality.AUDIO: stack_audio}
"""Modality -> decoded items, 1 or more, to a tensor [N, ...]. Images are always in a batch (data/collate.py)."""
