"""Sharding for tensor parallelism: every part by itself, and unsharding restores the full tensor."""

import pytest
import torch

from aki_megatron.checkpoint.shapes import meta_parameters, model_shapes
from aki_megatron.config.model import DecoderConfig, ModelConfig
from aki_megatron.config.trainable import LoraConfig, PartPlan, TrainingPlan
from aki_megatron.families.registry import FAMILIES
from aki_megatron.model.sharding import SHARD_SPECS, ShardSpec, shard_spec, shard_tensor, unshard_tensor


@pytest.mark.parametrize("num_kv_heads", [32, 8])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_part_sizes_sum_to_the_dimension(family: str, num_kv_heads: int) -> None:
    config = ModelConfig(decoder=DecoderConfig(family=family, num_kv_heads=num_kv_heads))
    shapes = model_shapes(config)
    for targets in ((), ("qkv_proj", "gate_up_proj"), ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
        plan = TrainingPlan({"decoder": PartPlan("lora")}, LoraConfig(rank=3, targets=targets))
        shapes |= {name: tuple(parameter.shape) for name, parameter in meta_parameters(config, plan).items()}
    specs = {name: shard_spec(name, config.decoder) for name in shapes}
    sharded = {name.replace("layers.31.", "layers.{i}.") for name, spec in specs.items() if spec}
    assert sharded >= set(SHARD_SPECS) - (set() if family == "qwen2" else {"layers.{i}.attention.qkv_proj.bias"})
    for name, spec in specs.items():
        if spec:
            assert sum(spec.part_sizes) == shapes[name][spec.dim], name


def test_parameters_that_are_not_in_the_table_are_replicated() -> None:
    decoder = ModelConfig().decoder
    for name in (
        "layers.3.attention_norm.weight",
        "layers.3.attention.q_norm.weight",
        "input_embedder.token_embedding.added_tokens",
        "lm_head.added_tokens.weight",
        "input_embedder.vision_encoder.norm.bias",
    ):
        assert shard_spec(name, decoder) is None


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_unshard_is_the_inverse_of_shard(num_ranks: int) -> None:
    for spec, shape in (
        (ShardSpec(0, (8, 4, 4)), (16, 3)),
        (ShardSpec(1, (8,)), (3, 8)),
        (ShardSpec(0, (4, 4)), (8,)),
        (None, (5,)),
    ):
        full = torch.randn(shape)
        shards = [shard_tensor(full, spec, rank, num_ranks) for rank in range(num_ranks)]
        assert torch.equal(unshard_tensor(shards, spec), full)


def test_a_rank_gets_its_heads_of_every_part() -> None:
    features = torch.arange(16)[:, None]  # 8 of queries, 4 of keys, 4 of values
    assert shard_tensor(features, ShardSpec(0, (8, 4, 4)), 1, 2).flatten().tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
