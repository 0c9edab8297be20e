"""Linear layers and embeddings, requested by how they may be split; whether they are is not the model's concern."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aki_megatron.model.loss import token_loss_sum


class LinearFactory(Protocol):
    """Build the parameterized layers of the decoder, whole or tensor-parallel.

    A column layer may hold a part of the output features, a row layer the matching part of the input features, so that
    column -> row is the whole map (Megatron-LM, Shoeybi et al., 2019). ``std`` is the standard deviation of the normal
    initialization; biases start at zero. A factory that splits initializes the whole weight before it keeps its shard,
    so weights do not depend on the number of tensor ranks.

    num_ranks  tensor ranks that the layers are split over
    """

    num_ranks: int

    def column(
        self, in_features: int, out_features: int, *, bias: bool, std: float, part_sizes: Sequence[int] = ()
    ) -> nn.Module:
        """[..., in_features] -> [..., local out_features].

        part_sizes  of the maps that the layer fuses, each of which is split by itself; empty: one map
        """

    def row(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        std: float,
        init: Callable[[Tensor], Any] | None = None,
    ) -> nn.Module:
        """[..., local in_features] -> [..., out_features].

        init  fills the whole weight in place of the normal distribution
        """

    def embedding(self, vocab_size: int, hidden_size: int, *, std: float) -> nn.Module:
        """Ids [...] -> embeddings [..., hidden_size]; the table may be split by vocabulary."""

    def lm_head(self, hidden_size: int, vocab_size: int, *, bias: bool, std: float) -> nn.Module:
        """[..., hidden_size] -> logits of ``vocab_range``.

        The input must come from ``copy_to_tensor_parallel_region``.
        """

    def vocab_range(self, vocab_size: int) -> range:
        """Return the token ids whose logits this process computes."""

    def copy_to_tensor_parallel_region(self, x: Tensor) -> Tensor:
        """Return ``x``, equal on all tensor ranks, for use in split layers; its gradient is summed over the ranks."""

    def gather_logits(self, logits: Tensor) -> Tensor:
        """Return logits [..., V] of all tokens, equal on all tensor ranks, from [..., len(vocab_range)]; no grad."""

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy (fp32 scalar) of logits [S, len(vocab_range)] for targets [S], none of them IGNORE."""

    def argmax(self, logits: Tensor) -> Tensor:
        """Return the token id [S] int64 of the largest logit of [S, len(vocab_range)]; the lowest of equal ones."""


class LocalLinears:
    """Whole layers, for one process."""

    num_ranks = 1

    def column(
        self, in_features: int, out_features: int, *, bias: bool, std: float, part_sizes: Sequence[int] = ()
    ) -> nn.Module:
        return _linear(in_features, out_features, bias, std)

    def row(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        std: float,
        init: Callable[[Tensor], Any] | None = None,
    ) -> nn.Module:
        return _linear(in_features, out_features, bias, std, init)

    def embedding(self, vocab_size: int, hidden_size: int, *, std: float) -> nn.Module:
        table = _UninitializedEmbedding(vocab_size, hidden_size)
        nn.init.normal_(table.weight, std=std)
        return table

    def lm_head(self, hidden_size: int, vocab_size: int, *, bias: bool, std: float) -> nn.Linear:
        return _linear(hidden_size, vocab_size, bias, std)

    def vocab_range(self, vocab_size: int) -> range:
        return range(vocab_size)

    def copy_to_tensor_parallel_region(self, x: Tensor) -> Tensor:
        return x

    def gather_logits(self, logits: Tensor) -> Tensor:
        return logits

    def loss_sum(self, logits: Tensor, targets: Tensor) -> Tensor:
        return token_loss_sum(logits, targets)

    def argmax(self, logits: Tensor) -> Tensor:
        return first_argmax(logits)


def first_argmax(logits: Tensor) -> Tensor:
    """Index [S] of the largest of [S, V]; of equal ones the first, which torch's argmax does not promise on a GPU."""
    num_columns = logits.shape[-1]
    columns = torch.arange(num_columns, device=logits.device)
    is_largest = logits == logits.amax(dim=-1, keepdim=True)
    # where no logit equals the largest, all are NaN; the last column stands for them
    return columns.where(is_largest, num_columns - 1).amin(dim=-1)


# torch's own initialization would only be overwritten, and takes half a minute at four billion parameters


class _UninitializedLinear(nn.Linear):
    def reset_parameters(self) -> None:
        """Leave the memory uninitialized; ``_linear`` fills it."""


class _UninitializedEmbedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Leave the memory uninitialized; ``LocalLinears.embedding`` fills it."""


def _linear(
    in_features: int, out_features: int, bias: bool, std: float, init: Callable[[Tensor], Any] | None = None
) -> nn.Linear:
    layer = _UninitializedLinear(in_features, out_features, bias=bias)
    with torch.no_grad():
        if init is None:
            layer.weight.normal_(std=std)
        else:
            init(layer.weight)
        if bias:
            layer.bias.zero_()
    return layer
