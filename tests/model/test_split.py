"""Cutting for tensor parallelism: every part by itself, and joining brings the whole back."""

import pytest
import torch

from aki_megatron.checkpoint.weight_names import model_shapes
from aki_megatron.config.model import FAMILIES, DecoderConfig, ModelConfig
from aki_megatron.model.split import SPLITS, Split, cut, join, split_of


@pytest.mark.parametrize("num_kv_heads", [32, 8])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_parts_fill_the_axis(family: str, num_kv_heads: int) -> None:
    config = ModelConfig(decoder=DecoderConfig(family=family, num_kv_heads=num_kv_heads))
    shapes = model_shapes(config)
    split = {name: split_of(name, config.decoder) for name in shapes}
    cut_ones = {name.replace("blocks.31.", "blocks.{i}.") for name, found in split.items() if found}
    assert cut_ones >= set(SPLITS) - (set() if family == "qwen2" else {"blocks.{i}.attention.qkv.bias"})
    for name, found in split.items():
        if found:
            assert sum(found.parts) == shapes[name][found.axis], name


def test_what_is_not_in_the_table_is_whole() -> None:
    decoder = ModelConfig().decoder
    for name in (
        "blocks.3.attention_norm.weight",
        "blocks.3.attention.query_norm.weight",
        "front.embedding.extra",
        "head.extra.weight",
        "front.vision.norm.bias",
    ):
        assert split_of(name, decoder) is None


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_join_undoes_cut(ranks: int) -> None:
    for split, shape in (
        (Split(0, (8, 4, 4)), (16, 3)),
        (Split(1, (8,)), (3, 8)),
        (Split(0, (4, 4)), (8,)),
        (None, (5,)),
    ):
        whole = torch.randn(shape)
        shares = [cut(whole, split, rank, ranks) for rank in range(ranks)]
        assert torch.equal(join(shares, split), whole)


def test_a_rank_gets_its_heads_of_every_part() -> None:
    rows = torch.arange(16)[:, None]  # 8 rows of queries, 4 of keys, 4 of values
    assert cut(rows, Split(0, (8, 4, 4)), 1, 2).flatten().tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
