"""Layers asked for by how they may be split; who splits them, and whether at all, the model never knows."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from aki_megatron.model.loss import token_loss_sum


class LinearFactory(Protocol):
    """Makes the layers of the decoder. Each maps [..., inputs] to [..., its share of outputs].

    A column layer may hold only some rows of its weight (outputs), a row layer only the matching columns (inputs),
    so column -> row composes to the whole map. ``std`` is the standard deviation of the normal initialization;
    biases start at zero. Whatever share a factory keeps, it draws the whole: weights do not depend on the split.
    """

    def column(self, inputs: int, outputs: int, *, bias: bool, std: float, parts: Sequence[int] = ()) -> nn.Module:
        """Linear layer whose outputs may be split; each of its fused ``parts`` (their sizes) by itself."""

    def row(self, inputs: int, outputs: int, *, bias: bool, std: float) -> nn.Module:
        """Linear layer whose inputs may be split; its output is whole."""

    def embedding(self, words: int, width: int, *, std: float) -> nn.Module:
        """Table [words, width] that may be split by words; ids [...] -> whole vectors [..., width]."""

    def head(self, width: int, words: int, *, bias: bool, std: float) -> nn.Module:
        """Logits of ``words(words)``, for an input that went through ``shared``."""

    def words(self, words: int) -> range:
        """The words of a split vocabulary that this process holds."""

    def shared(self, x: Tensor) -> Tensor:
        """``x``, which every process has alike, about to be used for a share of the work: its gradient is summed."""

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy, fp32 scalar, of logits [R, len(words)] of this process's words for targets [R]."""


class LocalLinears:
    """One process holds everything."""

    def column(self, inputs: int, outputs: int, *, bias: bool, std: float, parts: Sequence[int] = ()) -> nn.Module:
        """Linear layer [..., inputs] -> [..., outputs]."""
        return _linear(inputs, outputs, bias, std)

    def row(self, inputs: int, outputs: int, *, bias: bool, std: float) -> nn.Module:
        """Linear layer [..., inputs] -> [..., outputs]."""
        return _linear(inputs, outputs, bias, std)

    def embedding(self, words: int, width: int, *, std: float) -> nn.Module:
        """Ids [...] -> vectors [..., width]."""
        table = _SilentEmbedding(words, width)
        nn.init.normal_(table.weight, std=std)
        return table

    def head(self, width: int, words: int, *, bias: bool, std: float) -> nn.Linear:
        """Hidden [..., width] -> logits [..., words]."""
        return _linear(width, words, bias, std)

    def words(self, words: int) -> range:
        """All of them."""
        return range(words)

    def shared(self, x: Tensor) -> Tensor:
        """``x`` itself."""
        return x

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """See token_loss_sum."""
        return token_loss_sum(logits, targets)


# torch's own initialization is left out: it would only be overwritten, and costs half a minute at four billion weights


class _SilentLinear(nn.Linear):
    def reset_parameters(self) -> None:
        """Leave the memory as it is; _linear fills it."""


class _SilentEmbedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Leave the memory as it is; LocalLinears.embedding fills it."""


def _linear(inputs: int, outputs: int, bias: bool, std: float) -> nn.Linear:
    layer = _SilentLinear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(std=std)
        if bias:
            layer.bias.zero_()
    return layer
