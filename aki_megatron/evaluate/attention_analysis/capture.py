"""Attention probabilities of chosen queries and keys, recomputed while the model runs with its own kernels.

The kernels never hold probabilities. Beside them, this module computes softmax(q k^T / sqrt(d)) of a few rows from the
queries and keys that the kernel gets and from the mask object: in fp32 over all keys of a row, of which only the chosen
ones are kept. The model's own computation does not change by a bit.

Letters: B sequences, T positions, L chosen layers, H query heads, R chosen queries, C chosen keys, d head dim.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from aki_megatron.attention import AttentionMask
from aki_megatron.errors import ConfigError
from aki_megatron.model.decoder import Attention
from aki_megatron.model.stage import Stage

MAX_ELEMENTS = 2**24
"""Most logits that are in memory at a time (64 MiB in fp32)."""


@dataclass(frozen=True)
class Window:
    """Which probabilities of one sequence are kept: queries [R] and keys [C], as positions of the sequence."""

    queries: np.ndarray
    keys: np.ndarray


@dataclass(frozen=True)
class Chunk:
    """Probabilities of some heads and rows of one layer and one sequence.

    layer    index among the chosen layers
    weights  [heads, rows, C] fp32; a head or row is one of the slices ``heads`` and ``rows`` of H and R
    """

    layer: int
    sequence: int
    heads: slice
    rows: slice
    weights: Tensor


Sink = Callable[[Chunk], None]
"""Takes every chunk, in any order; what is kept is up to it."""


class FullTable:
    """Every probability, [L, H, R, C] for each sequence: for short prompts."""

    def __init__(self, windows: Sequence[Window], num_layers: int, num_heads: int) -> None:
        self.tables = [torch.zeros(num_layers, num_heads, len(w.queries), len(w.keys)) for w in windows]

    def __call__(self, chunk: Chunk) -> None:
        self.tables[chunk.sequence][chunk.layer, chunk.heads, chunk.rows] = chunk.weights.cpu()


class RowTable:
    """Means over layers and heads, [R, C] for each sequence."""

    def __init__(self, windows: Sequence[Window], num_layers: int, num_heads: int) -> None:
        self.tables = [torch.zeros(len(window.queries), len(window.keys)) for window in windows]
        self._count = num_layers * num_heads

    def __call__(self, chunk: Chunk) -> None:
        self.tables[chunk.sequence][chunk.rows] += chunk.weights.sum(dim=0).cpu() / self._count


class HeadTable:
    """Means over rows, [L, H, C] for each sequence.

    counted  of each sequence bool [R, C]: pairs that count; others add 0, and a mean is over all R rows
    """

    def __init__(self, counted: Sequence[Tensor], num_layers: int, num_heads: int) -> None:
        self.tables = [torch.zeros(num_layers, num_heads, pairs.shape[1]) for pairs in counted]
        self._counted = counted

    def __call__(self, chunk: Chunk) -> None:
        counted = self._counted[chunk.sequence]
        weights = chunk.weights.cpu() * counted[chunk.rows]
        self.tables[chunk.sequence][chunk.layer, chunk.heads] += weights.sum(dim=1) / max(1, len(counted))


class AttentionCapture:
    """While it is entered, every whole pass or prefill of the model also sends probabilities to ``sink``.

    windows  one for each sequence of the batch; one segment per sequence
    layers   which decoder layers, by number; Chunk.layer counts them in this order

    Decode steps with a cache are left alone. The model must be whole, in one process.
    """

    def __init__(
        self,
        model: Stage,
        windows: Sequence[Window],
        layers: Sequence[int],
        sink: Sink,
        *,
        max_elements: int = MAX_ELEMENTS,
    ) -> None:
        self._model = model
        self._windows = windows
        self._layers = layers
        self._sink = sink
        self._max_elements = max_elements
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "AttentionCapture":
        for number, layer in enumerate(self._layers):
            attention = self._model.layers[str(layer)].attention
            assert isinstance(attention, Attention)
            self._handles.append(attention.register_forward_pre_hook(self._hook(number), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, number: int) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        @torch.no_grad()
        def capture(attention: Attention, inputs: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]) -> None:
            mask: AttentionMask | None = options["mask"]
            if mask is None:
                return
            assert mask.shape[0] == len(self._windows), (mask.shape, len(self._windows))
            q, k, _ = attention.project(*inputs)
            for sequence, window in enumerate(self._windows):
                self._send(number, sequence, window, q[sequence], k[sequence], mask)

        return capture

    def _send(self, layer: int, sequence: int, window: Window, q: Tensor, k: Tensor, mask: AttentionMask) -> None:
        """Send the window of one layer and sequence: q [H, T, d], k [Hkv, T, d]."""
        num_rows, num_keys = len(window.queries), k.shape[1]
        group = q.shape[0] // k.shape[0]
        rows_at_once = max(1, min(num_rows, self._max_elements // (group * num_keys)))
        kv_at_once = max(1, self._max_elements // (group * num_keys * rows_at_once))
        for first in range(0, num_rows, rows_at_once):
            rows = slice(first, min(first + rows_at_once, num_rows))
            queries = window.queries[rows]
            seen = mask.rows(sequence, queries).to(q.device)
            for kv_first in range(0, k.shape[0], kv_at_once):
                kv = slice(kv_first, min(kv_first + kv_at_once, k.shape[0]))
                heads = slice(kv.start * group, kv.stop * group)
                chosen = q[heads, torch.from_numpy(queries).to(q.device)]
                weights = probabilities(chosen, k[kv], seen, torch.from_numpy(window.keys).to(q.device))
                self._sink(Chunk(layer, sequence, heads, rows, weights))


def probabilities(q: Tensor, k: Tensor, seen: Tensor, keys: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) over all keys, of which ``keys`` [C] are returned: [H, R, C] in fp32.

    q     [H, R, d]
    k     [Hkv, T, d], Hkv a divisor of H
    seen  bool [R, T]; what a query does not see is exactly 0, and a query that sees nothing has 0 everywhere
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(0, (k.shape[0], -1))
    logits = (grouped @ k.to(dtype)[:, None].transpose(-2, -1)) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~seen, -torch.inf)
    total = logits.logsumexp(dim=-1, keepdim=True)
    weights = (logits[..., keys] - total.masked_fill(~seen.any(-1, keepdim=True), 0.0)).exp()
    return weights.flatten(0, 1).float()


def chosen_layers(model: Stage, layers: Collection[int] | None) -> tuple[int, ...]:
    """Return the layers in order, all of them for None; negative numbers count from the end.

    Raises ConfigError for a number that the model has no layer for.
    """
    count = model.config.decoder.num_layers
    if layers is None:
        return tuple(range(count))
    if wrong := [layer for layer in layers if not -count <= layer < count]:
        raise ConfigError(f"layers {wrong} do not exist: the model has {count}, numbered 0 to {count - 1}.")
    if not layers:
        raise ConfigError(f"no layer is chosen; choose some of 0 to {count - 1}, or leave them out for all.")
    return tuple(sorted({layer % count for layer in layers}))
