"""The nouns every room speaks. Words only: no logic beyond shape checks.

Letters: B rows, T tokens, N images, Q latents per image, D width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
"""Target of a position at which nothing is learnt (torch's cross-entropy default)."""

NO_SEGMENT = -1
"""Segment id of a place that belongs to no sample: right padding of a row."""


class Modality(IntEnum):
    """What a token is. A new modality is one more value; the attention rules read these ids."""

    PAD = 0
    TEXT = 1
    """System and user text, chat markers up to and including the assistant marker: the prompt."""
    RESPONSE = 2
    """What is learnt in training or generated in inference: answers, captions, the end token."""
    IMAGE = 3
    """One place per resampler latent."""
    AUDIO = 4


@dataclass(frozen=True)
class Turn:
    """One exchange: what the user asks and what the assistant must answer."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Conversation:
    """One fine-tuning sample before tokenization.

    ``image`` is an encoded picture (JPEG or PNG): a file, its bytes, or None for text only.
    ``key`` names the sample for errors and the ledger: ``source/task/annotation id``.
    """

    key: str
    turns: tuple[Turn, ...]
    image: Path | bytes | None


@dataclass(frozen=True)
class Caption:
    """One pretraining sample before tokenization; ``image`` holds encoded JPEG or PNG bytes."""

    key: str
    text: str
    image: bytes


@dataclass(frozen=True)
class Picture:
    """A decoded image at the encoder's size: ``size`` x ``size`` pixels, row by row, 3 bytes (RGB) each."""

    rgb: bytes
    size: int


@dataclass(frozen=True)
class Sample:
    """Token ids, modality ids and targets, written in one stroke by the template.

    The three lists have one length. Each image occupies Q consecutive places whose token id is the
    image token and whose modality is IMAGE. ``targets[i]`` is the token to predict **from** place i
    (already shifted), IGNORE where nothing is learnt. A stream hands out decoded images, so that an
    unreadable one is found and replaced before it is in a batch.
    """

    key: str
    token_ids: list[int]
    modality_ids: list[int]
    targets: list[int]
    image: Path | bytes | Picture | None


@dataclass(frozen=True)
class Batch:
    """A rectangle of samples, right padded: what the first stage of the model takes in.

    token_ids     [B, T] int64; IMAGE places hold the image token, PAD places the pad token
    modality_ids  [B, T] int8, values of Modality
    segment_ids   [B, T] int32, which sample of the row; NO_SEGMENT on padding
    position_ids  [B, T] int32, restarting at 0 in every segment
    targets       [B, T] int64, already shifted; IGNORE where nothing is learnt
    pixels        [N, 3, H, W] float32, images in the row-major order of their IMAGE places
    bad           elements of the sources that could not be used while this batch was made
    """

    token_ids: Tensor
    modality_ids: Tensor
    segment_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    pixels: Tensor
    bad: int = 0

    def __post_init__(self) -> None:
        shape = self.token_ids.shape
        for name in ("modality_ids", "segment_ids", "position_ids", "targets"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"Batch.{name} has shape {tuple(getattr(self, name).shape)}, token_ids {tuple(shape)}")
        if self.pixels.dim() != 4:
            raise ValueError(f"Batch.pixels must be [N, 3, H, W], got {tuple(self.pixels.shape)}")

    def to(self, device: torch.device) -> "Batch":
        """The same batch on ``device``."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory of the host."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            changed[name] = change(value) if isinstance(value, Tensor) else value
        return Batch(**changed)

    @property
    def supervised_tokens(self) -> int:
        """Number of places at which something is learnt."""
        return int((self.targets != IGNORE).sum())


@dataclass(frozen=True)
class StageActivations:
    """Everything a stage needs and all that crosses a stage boundary.

    hidden  [B, T, D] compute dtype; has a gradient
    ids     [B, T, 4] int32: modality, segment, position, target; has none
    """

    hidden: Tensor
    ids: Tensor

    @property
    def modality_ids(self) -> Tensor:
        """[B, T] int32"""
        return self.ids[..., 0]

    @property
    def segment_ids(self) -> Tensor:
        """[B, T] int32"""
        return self.ids[..., 1]

    @property
    def position_ids(self) -> Tensor:
        """[B, T] int32"""
        return self.ids[..., 2]

    @property
    def targets(self) -> Tensor:
        """[B, T] int32"""
        return self.ids[..., 3]


def stack_ids(batch: Batch) -> Tensor:
    """The ids of a batch as a StageActivations holds them: [B, T, 4] int32."""
    columns = (batch.modality_ids, batch.segment_ids, batch.position_ids, batch.targets)
    return torch.stack([column.to(torch.int32) for column in columns], dim=-1)


class ControlRequest(IntFlag):
    """What ranks want done after a step; what one wants, all do, after the same step."""

    NONE = 0
    SAVE = 1
    """Write a checkpoint now."""
    STOP = 2
    """Write a checkpoint and end, to be started again later."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did, summed over all ranks; one line of metrics.jsonl is made of it."""

    loss: float
    """Mean over the supervised tokens of the whole step."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    supervised_tokens: int
    tokens: int
    """Real (not padding) tokens, image places included."""
    places: int
    """Places of all rows, padding included; tokens / places is the share that is not wasted."""
    images: int
    bad_samples: int
    """Elements of the sources that could not be used."""
    seconds: float
    skipped: bool
    """True when the optimizer did not move: a gradient was not finite, or the step was refused."""
    wish: ControlRequest = ControlRequest.NONE
    """All ranks' control_signals together; the same on every rank."""
