"""Which parameters tensor parallelism shards, and how: one table for layers, engine and checkpoints.

A fused parameter holds several maps one after another (queries, keys, values; gate, up). Each of these parts is sharded
by itself, so that every rank holds its heads of every kind; a plain chunk would give rank 0 queries only.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aki_megatron.config.model import DecoderConfig


@dataclass(frozen=True)
class ShardSpec:
    """Shard a tensor along ``dim``, each of its parts (``part_sizes`` along that dim) by itself."""

    dim: int
    part_sizes: tuple[int, ...]


def qkv_sizes(config: DecoderConfig) -> tuple[int, int, int]:
    """Output features of the fused projection: queries, keys, values."""
    keys = config.num_kv_heads * config.head_dim
    return config.attention_size, keys, keys


def gate_up_sizes(config: DecoderConfig) -> tuple[int, int]:
    """Output features of the fused projection: the gate, then what it gates."""
    return config.intermediate_size, config.intermediate_size


SHARD_SPECS: dict[str, Callable[[DecoderConfig], ShardSpec]] = {
    "input_embedder.token_embedding.base.weight": lambda config: ShardSpec(0, (config.padded_vocab_size,)),
    "layers.{i}.attention.qkv_proj.weight": lambda config: ShardSpec(0, qkv_sizes(config)),
    "layers.{i}.attention.qkv_proj.bias": lambda config: ShardSpec(0, qkv_sizes(config)),
    "layers.{i}.attention.out_proj.weight": lambda config: ShardSpec(1, (config.attention_size,)),
    "layers.{i}.mlp.gate_up_proj.weight": lambda config: ShardSpec(0, gate_up_sizes(config)),
    "layers.{i}.mlp.down_proj.weight": lambda config: ShardSpec(1, (config.intermediate_size,)),
    "lm_head.base.weight": lambda config: ShardSpec(0, (config.padded_vocab_size,)),
    "lm_head.base.bias": lambda config: ShardSpec(0, (config.padded_vocab_size,)),
}
"""Parameter name -> its shard spec; all other parameters are replicated over the tensor ranks."""


def shard_spec(name: str, config: DecoderConfig) -> ShardSpec | None:
    """Return how the parameter ``name`` is sharded; None where every tensor rank holds all of it."""
    make = SHARD_SPECS.get(re.sub(r"^layers\.\d+\.", "layers.{i}.", name))
    return make(config) if make else None


def shard_tensor(full: Tensor, spec: ShardSpec | None, rank: int, num_ranks: int) -> Tensor:
    """Return the shard of tensor rank ``rank`` of ``num_ranks``; a view, unless several parts are concatenated."""
    if spec is None or num_ranks == 1:
        return full
    assert full.shape[spec.dim] == sum(spec.part_sizes) and not any(size % num_ranks for size in spec.part_sizes)
    shards = [part.chunk(num_ranks, spec.dim)[rank] for part in full.split(spec.part_sizes, spec.dim)]
    return shards[0] if len(shards) == 1 else torch.cat(shards, spec.dim)


def unshard_tensor(shards: Sequence[Tensor], spec: ShardSpec | None) -> Tensor:
    """Return the full tensor from the shards of all tensor ranks, in rank order: the inverse of ``shard_tensor``."""
    if spec is None or len(shards) == 1:
        return shards[0]
    sizes = [size // len(shards) for size in spec.part_sizes]
    parts_of_ranks = [shard.split(sizes, spec.dim) for shard in shards]
    return torch.cat([parts[index] for index in range(len(sizes)) for parts in parts_of_ranks], spec.dim)
