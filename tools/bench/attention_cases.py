"""Inputs of the attention benchmarks: ids like those of AKI's samples, head_dim of Phi-3.5-mini (96).

Letters: B sequences, T positions, H heads, d head_dim.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aki_megatron.attention import AttentionMask
from aki_megatron.config.attention import AttentionConfig
from aki_megatron.types import Modality

SYSTEM_TOKENS, IMAGE_TOKENS, QUESTION_TOKENS = 12, 144, 100
HEAD_DIM = 96


@dataclass(frozen=True)
class Case:
    """A batch: sequences of samples of the given lengths, right padded to ``length``. ``heads`` is for a CPU."""

    name: str
    sequences: tuple[tuple[int, ...], ...]
    length: int
    heads: int

    def ids(self) -> tuple[Tensor, Tensor]:
        """Modality int8 and segment int32 [B, T]: system text, image, question, response in every sample."""
        modality = torch.zeros(len(self.sequences), self.length, dtype=torch.int8)
        segment = torch.full((len(self.sequences), self.length), -1, dtype=torch.int32)
        for b, sample_lengths in enumerate(self.sequences):
            start = 0
            for number, length in enumerate(sample_lengths):
                image, question = start + SYSTEM_TOKENS, start + SYSTEM_TOKENS + IMAGE_TOKENS
                modality[b, start : start + length] = Modality.RESPONSE
                modality[b, start : question + QUESTION_TOKENS] = Modality.TEXT
                modality[b, image:question] = Modality.IMAGE
                segment[b, start : start + length] = number
                start += length
        return modality, segment

    def mask(self, rule: str) -> AttentionMask:
        """The mask of a rule; every position that predicts a response of its own sample is supervised."""
        modality, segment = self.ids()
        supervised = torch.zeros(modality.shape, dtype=torch.bool)
        supervised[:, :-1] = (modality[:, 1:] == Modality.RESPONSE) & (segment[:, 1:] == segment[:, :-1])
        return AttentionMask.build(modality, segment, AttentionConfig(rule=rule), supervised=supervised)


def sample_lengths(total: int, low: int, high: int, seed: int) -> tuple[int, ...]:
    """Random lengths in [low, high], as many as surely fit ``total`` tokens."""
    rng = random.Random(seed)
    lengths: list[int] = []
    while sum(lengths) + high <= total:
        lengths.append(rng.randint(low, high))
    return tuple(lengths)


def cases() -> list[Case]:
    """The table of docs/benchmarks."""
    ragged = random.Random(0)
    return [
        Case("656", ((656,),) * 8, 656, 4),
        Case("656 ragged", tuple((ragged.randint(300, 656),) for _ in range(8)), 656, 4),
        Case("2048", ((2048,),) * 2, 2048, 2),
        Case("4096", ((4096,),), 4096, 2),
        Case("8192", ((8192,),), 8192, 1),
        Case("packed 4096", (sample_lengths(4096, 400, 656, 1),), 4096, 2),
        Case("packed 16384", (sample_lengths(16384, 400, 656, 2),), 16384, 2),
    ]


def inputs(case: Case, heads: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v (leaves) and a gradient [B, H, T, d], token-major as in the model."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(case.sequences), case.length, heads, HEAD_DIM)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).transpose(1, 2) for _ in range(4)]
    return [*(x.requires_grad_() for x in tensors[:3]), tensors[3]]


def step(run: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    """One forward and backward pass; the gradients are discarded."""
    torch.autograd.grad(run(q, k, v), (q, k, v), grad)
