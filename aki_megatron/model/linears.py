"""Layers asked for by how they may be split; who splits them, and whether at all, the model never knows."""

from typing import Protocol

import torch
from torch import nn


class LinearFactory(Protocol):
    """Makes the layers of the decoder. Each maps [..., inputs] to [..., its share of outputs].

    A column layer may hold only some rows of its weight (outputs), a row layer only the matching columns (inputs),
    so column -> row composes to the whole map. ``std`` is the standard deviation of the normal initialization;
    biases start at zero.
    """

    def column(self, inputs: int, outputs: int, *, bias: bool, std: float) -> nn.Module:
        """Linear layer whose outputs may be split."""

    def row(self, inputs: int, outputs: int, *, bias: bool, std: float) -> nn.Module:
        """Linear layer whose inputs may be split; its output is whole."""

    def embedding(self, words: int, width: int, *, std: float) -> nn.Module:
        """Table [words, width] that may be split by words; ids [...] -> whole vectors [..., width]."""

    def head(self, width: int, words: int, *, bias: bool, std: float) -> nn.Module:
        """Logits over a vocabulary that may be split by words."""


class PlainLinears:
    """One process holds everything."""

    def column(self, inputs: int, outputs: int, *, bias: bool, std: float) -> nn.Module:
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

    def head(self, width: int, words: int, *, bias: bool, std: float) -> nn.Module:
        """Hidden [..., width] -> logits [..., words]."""
        return _linear(width, words, bias, std)


# torch's own initialization is left out: it would only be overwritten, and costs half a minute at four billion weights


class _SilentLinear(nn.Linear):
    def reset_parameters(self) -> None:
        """Leave the memory as it is; _linear fills it."""


class _SilentEmbedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Leave the memory as it is; PlainLinears.embedding fills it."""


def _linear(inputs: int, outputs: int, bias: bool, std: float) -> nn.Linear:
    layer = _SilentLinear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(std=std)
        if bias:
            layer.bias.zero_()
    return layer
