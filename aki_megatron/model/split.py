"""Which tensors tensor parallelism cuts, along which axis, and into which parts: one table for layers and checkpoints.

A fused tensor holds several maps one after another (queries, keys, values; gate, up). Each of these parts is cut by
itself, so that every rank holds its share of the heads of every kind; a plain chunk would give rank 0 queries only.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aki_megatron.config.model import DecoderConfig


@dataclass(frozen=True)
class Split:
    """A tensor is cut along ``axis``, each of its ``parts`` (sizes along that axis) by itself."""

    axis: int
    parts: tuple[int, ...]


def qkv_parts(config: DecoderConfig) -> tuple[int, int, int]:
    """Rows of the fused projection: all queries, all keys, all values, by heads."""
    keys = config.num_kv_heads * config.head_dim
    return config.num_heads * config.head_dim, keys, keys


def gate_up_parts(config: DecoderConfig) -> tuple[int, int]:
    """Rows of the fused projection: the gate, then what it gates."""
    return config.intermediate_size, config.intermediate_size


SPLITS: dict[str, Callable[[DecoderConfig], Split]] = {
    "front.embedding.table.weight": lambda config: Split(0, (config.padded_vocab_size,)),
    "blocks.{i}.attention.qkv.weight": lambda config: Split(0, qkv_parts(config)),
    "blocks.{i}.attention.qkv.bias": lambda config: Split(0, qkv_parts(config)),
    "blocks.{i}.attention.out.weight": lambda config: Split(1, (config.hidden_size,)),
    "blocks.{i}.feed_forward.gate_up.weight": lambda config: Split(0, gate_up_parts(config)),
    "blocks.{i}.feed_forward.down.weight": lambda config: Split(1, (config.intermediate_size,)),
    "head.output.weight": lambda config: Split(0, (config.padded_vocab_size,)),
    "head.output.bias": lambda config: Split(0, (config.padded_vocab_size,)),
}
"""Parameter name -> its split; every tensor rank holds the whole of all others."""


def split_of(name: str, config: DecoderConfig) -> Split | None:
    """How the parameter ``name`` is cut; None where every tensor rank holds the whole."""
    make = SPLITS.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name))
    return make(config) if make else None


def cut(whole: Tensor, split: Split | None, rank: int, ranks: int) -> Tensor:
    """What tensor rank ``rank`` of ``ranks`` holds of a whole tensor; a view where there is nothing to put together."""
    if split is None or ranks == 1:
        return whole
    assert whole.shape[split.axis] == sum(split.parts) and not any(part % ranks for part in split.parts)
    shares = [part.chunk(ranks, split.axis)[rank] for part in whole.split(split.parts, split.axis)]
    return shares[0] if len(shares) == 1 else torch.cat(shares, split.axis)


def join(shares: Sequence[Tensor], split: Split | None) -> Tensor:
    """The whole tensor from what each tensor rank holds, in rank order: the inverse of ``cut``."""
    if split is None or len(shares) == 1:
        return shares[0]
    sizes = [part // len(shares) for part in split.parts]
    pieces = [share.split(sizes, split.axis) for share in shares]
    return torch.cat([piece[part] for part in range(len(sizes)) for piece in pieces], split.axis)
