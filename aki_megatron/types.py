"""Types shared by all packages: modalities, conversations, samples, batches, what crosses a pipeline stage boundary.

Letters: B sequences, T positions, N images, Q latents per image, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

IGNORE = -100
"""Target of an unsupervised position (the default ``ignore_index`` of torch's cross entropy)."""

BYTE_ORDER_MARK = "\ufeff"
"""What some editors and exports write at the beginning of a text; it is no part of it."""

NO_SEGMENT = -1
"""Segment id of a position that belongs to no sample: right padding of a sequence."""


class Modality(IntEnum):
    """What a token is. A new modality is one more value; the attention rules read these ids."""

    PAD = 0
    TEXT = 1
    """The prompt: system and user text, chat markers up to and including the assistant marker."""
    RESPONSE = 2
    """Supervised in training, generated in inference: answers, captions, the end token."""
    IMAGE = 3
    """One position per resampler latent."""
    AUDIO = 4
    """One position per resampler latent."""


MEDIA_MODALITIES = (Modality.IMAGE, Modality.AUDIO)
"""Modalities whose positions hold the output of an encoder and a resampler instead of token embeddings."""


@dataclass(frozen=True)
class DecodedImage:
    """An image at the encoder's size: ``size`` x ``size`` pixels in row-major order, 3 bytes (RGB) each.

    ``checksum`` is of what the pixels were made from: the encoded file, and the seed of the augmentation if any.
    """

    rgb: bytes
    size: int
    checksum: int = field(default=0, compare=False)


@dataclass(frozen=True)
class DecodedAudio:
    """A recording as the encoder takes it: ``num_mel_bins`` x ``num_frames`` values, float32 in row-major order.

    ``checksum`` is of the encoded file.
    """

    log_mel: bytes
    num_mel_bins: int
    num_frames: int
    checksum: int = field(default=0, compare=False)


MediaContent = Path | bytes | DecodedImage | DecodedAudio
"""A media item encoded, as a file or as its bytes, or decoded for the encoder of its modality."""


@dataclass(frozen=True)
class MediaItem:
    """An image or a recording of a sample."""

    modality: Modality
    content: MediaContent


def image_items(image: Path | bytes | DecodedImage | None) -> tuple[MediaItem, ...]:
    """Return the media of a sample with this one image; None: without any."""
    return () if image is None else (MediaItem(Modality.IMAGE, image),)


@dataclass(frozen=True)
class Placeholder:
    """Where in a prompt a media item stands: before the character at ``offset``."""

    offset: int
    modality: Modality


@dataclass(frozen=True)
class Turn:
    """One exchange: what the user asks and what the assistant must answer.

    placeholders  in the order of their offsets, which is that of the conversation's media
    """

    prompt: str
    response: str
    placeholders: tuple[Placeholder, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """One fine-tuning sample before tokenization.

    key             names the sample in errors and in the sample audit log: ``source/task/annotation id``
    media           what the placeholders of all turns stand for, in order; without any placeholder the media come
                    before the first prompt, each followed by a newline, as in AKI's format
    system_message  of this sample; None: that of the run (data.system_message)
    """

    key: str
    turns: tuple[Turn, ...]
    media: tuple[MediaItem, ...] = ()
    system_message: str | None = None

    @property
    def images(self) -> list[MediaContent]:
        """The images among the media."""
        return [item.content for item in self.media if item.modality == Modality.IMAGE]


@dataclass(frozen=True)
class Caption:
    """One pretraining sample before tokenization.

    image   the bytes of an encoded image
    prefix  fraction of the text, from its beginning, that is prompt: not learnt, and visible to the image
    """

    key: str
    text: str
    image: bytes
    prefix: float = 0.0

    @property
    def media(self) -> tuple[MediaItem, ...]:
        """The image."""
        return image_items(self.image)


@dataclass(frozen=True)
class Sample:
    """Token ids, modality ids and targets of one sample, all built by the template in one pass.

    The three lists have one length. Each media item occupies Q consecutive positions, in the order of ``media``, whose
    token id is the image token and whose modality is the item's. ``targets[i]`` is the token to predict **from**
    position i (already shifted), IGNORE where nothing is supervised. A stream returns decoded media, so that an
    unreadable one is replaced before it is batched.
    ``num_cut_tokens`` is by how many tokens the text was too long for data.max_text_tokens.
    """

    key: str
    token_ids: list[int]
    modality_ids: list[int]
    targets: list[int]
    media: tuple[MediaItem, ...] = ()
    num_cut_tokens: int = 0

    @property
    def images(self) -> list[MediaContent]:
        """The images among the media."""
        return [item.content for item in self.media if item.modality == Modality.IMAGE]


@dataclass(frozen=True)
class Batch:
    """One micro-batch of right-padded sequences, the input of the first pipeline stage.

    token_ids        [B, T] int64; IMAGE positions hold the image token, PAD positions the pad token
    modality_ids     [B, T] int8, values of Modality
    segment_ids      [B, T] int32, index of the sample in its sequence; NO_SEGMENT on padding
    position_ids     [B, T] int32, restarting at 0 in every segment
    targets          [B, T] int64, already shifted; IGNORE where nothing is supervised
    media            modality -> [N, ...] float32, the inputs of its encoder in the row-major order of their positions:
                     images are [N, 3, H, W], recordings [N, mel bands, frames]; a modality that no sample has may
                     be missing
    num_bad_samples  samples that could not be used while this batch was built
    num_cut_samples  samples whose text is longer than data.max_text_tokens, and so was cut

    Raises ValueError for tensors whose shapes do not agree.
    """

    token_ids: Tensor
    modality_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    media: Mapping[Modality, Tensor]
    num_bad_samples: int = 0
    num_cut_samples: int = 0

    def __post_init__(self) -> None:
        shape = self.token_ids.shape
        for name in ("modality_ids", "segment_ids", "position_ids", "targets"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"Batch.{name} has shape {tuple(getattr(self, name).shape)}, token_ids {tuple(shape)}")
        images = self.media.get(Modality.IMAGE)
        if images is not None and images.dim() != 4:
            raise ValueError(f"Images must be [N, 3, H, W], got {tuple(images.shape)}")

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked host memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            changed[name] = function(value) if isinstance(value, Tensor) else value
        changed["media"] = {modality: function(tensor) for modality, tensor in self.media.items()}
        return Batch(**changed)

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch, media included."""
        values = [getattr(self, name) for name in self.__dataclass_fields__]
        return [value for value in values if isinstance(value, Tensor)] + list(self.media.values())

    def num_items(self, modality: Modality) -> int:
        """Number of media items of a modality."""
        return len(self.media[modality]) if modality in self.media else 0

    @property
    def supervised_tokens(self) -> int:
        """Number of positions with a target."""
        return int((self.targets != IGNORE).sum())


@dataclass(frozen=True)
class StackedIds:
    """Modality, segment and position ids and targets of a micro-batch in one tensor, so that one message carries them.

    stacked  [B, T, NUM_COLUMNS] int32; read it through the properties, which alone know the order of the columns
    """

    stacked: Tensor
    NUM_COLUMNS: ClassVar[int] = 4

    @classmethod
    def stack(cls, modality_ids: Tensor, segment_ids: Tensor, position_ids: Tensor, targets: Tensor) -> "StackedIds":
        """Stack four tensors [B, T] of any integer type."""
        columns = (modality_ids, segment_ids, position_ids, targets)
        return cls(torch.stack([column.to(torch.int32) for column in columns], dim=-1))

    @property
    def modality_ids(self) -> Tensor:
        """[B, T] int32"""
        return self.stacked[..., 0]

    @property
    def segment_ids(self) -> Tensor:
        """[B, T] int32"""
        return self.stacked[..., 1]

    @property
    def position_ids(self) -> Tensor:
        """[B, T] int32"""
        return self.stacked[..., 2]

    @property
    def targets(self) -> Tensor:
        """[B, T] int32, IGNORE where nothing is supervised"""
        return self.stacked[..., 3]

    def prefix(self, length: int) -> "StackedIds":
        """Return the ids of the first ``length`` positions of every sequence."""
        return StackedIds(self.stacked[:, :length])


def stack_ids(batch: Batch) -> StackedIds:
    """Return the ids and targets of ``batch`` as the pipeline stages take them."""
    return StackedIds.stack(batch.modality_ids, batch.segment_ids, batch.position_ids, batch.targets)


@dataclass(frozen=True)
class StageActivations:
    """All that one pipeline stage sends to the next.

    hidden  [B, T, D] in the compute dtype; its gradient is sent back
    ids     of the same positions
    """

    hidden: Tensor
    ids: StackedIds


class ControlRequest(IntFlag):
    """What a rank asks of all ranks after a step. Requests are combined, so that all ranks act after the same step."""

    NONE = 0
    SAVE = 1
    """Write a checkpoint now."""
    STOP = 2
    """Write a checkpoint and end; the run is restarted later."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, summed over all ranks; metrics.jsonl has one line per report."""

    loss: float
    """Mean over the supervised tokens of the whole step."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    supervised_tokens: int
    tokens: int
    """Positions that are not padding, image positions included."""
    positions: int
    """All positions, padding included; tokens / positions is the fraction that is not wasted."""
    images: int
    """Media items of all modalities."""
    bad_samples: int
    """Elements of the data sources that could not be used."""
    seconds: float
    skipped: bool
    """Whether the optimizer step was skipped: a gradient was not finite, or the update was refused."""
    control: ControlRequest = ControlRequest.NONE
    """The requests of all ranks combined; the same on every rank."""
    cut_samples: int = 0
    """Samples whose text is longer than data.max_text_tokens, and so was cut."""
