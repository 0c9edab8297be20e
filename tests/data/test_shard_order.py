"""The order of the samples of many tars: every sample once per epoch, few tars at a time, any draw by arithmetic."""

import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aki_megatron.data.shard_order import ShardOrder

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any)


@given(counts=COUNTS, shards_per_block=st.integers(1, 50), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_sample_once_per_epoch(counts: list[int], shards_per_block: int, seed: int) -> None:
    order = ShardOrder(np.array(counts), seed=seed, shards_per_block=shards_per_block)
    size = sum(counts)
    assert len(order) == size
    for first in (0, size, 7 * size):
        assert sorted(order.item_index(first + offset) for offset in range(size)) == list(range(size))


@given(counts=COUNTS, shards_per_block=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_a_block_is_finished_before_the_next_begins(counts: list[int], shards_per_block: int) -> None:
    order = ShardOrder(np.array(counts), seed=1, shards_per_block=shards_per_block)
    ends = np.cumsum(counts)
    shards = [int(np.searchsorted(ends, order.item_index(index), side="right")) for index in range(sum(counts))]
    first = {shard: shards.index(shard) for shard in set(shards)}
    last = {shard: len(shards) - 1 - shards[::-1].index(shard) for shard in set(shards)}
    for index in range(len(shards)):  # tars that are begun and not finished
        assert sum(first[shard] <= index <= last[shard] for shard in first) <= shards_per_block


def test_draws_do_not_depend_on_earlier_draws() -> None:
    counts = np.array([5, 0, 9, 1, 12, 7])
    one = ShardOrder(counts, seed=3, shards_per_block=2)
    forward = [one.item_index(index) for index in range(170)]
    other = ShardOrder(counts, seed=3, shards_per_block=2)
    assert [other.item_index(index) for index in reversed(range(170))][::-1] == forward
    assert len(other._epochs) <= 2


def test_seed_name_and_epoch_change_the_order() -> None:
    counts = np.full(10, 10)

    def samples(first: int = 0, **changes) -> list[int]:
        order = ShardOrder(counts, **({"seed": 1, "shards_per_block": 3} | changes))
        return [order.item_index(first + index) for index in range(100)]

    others = [samples(100), samples(seed=2), samples(name="ocr"), samples(shards_per_block=4)]
    assert all(other != samples() for other in others)
    assert samples() == samples()


def test_shuffled_well_inside_a_block() -> None:
    order = ShardOrder(np.full(64, 100), seed=5, shards_per_block=16)
    block = [order.item_index(index) for index in range(1600)]
    steps = np.abs(np.diff(block))
    assert np.mean([a // 100 == b // 100 for a, b in pairwise(block)]) < 0.1  # 1/16 by chance
    assert np.mean(steps == 1) < 0.01
    tars = {sample // 100 for sample in block}
    assert len(tars) == 16 and tars != set(range(16))


def test_blocks_are_of_equal_size() -> None:
    order = ShardOrder(np.ones(33, dtype=np.int64), seed=0, shards_per_block=16)
    assert sorted(np.diff(order._epoch(0).block_starts)) == [11, 11, 11]


def test_a_replacement_comes_from_the_same_block() -> None:
    order = ShardOrder(np.full(40, 50), seed=2, shards_per_block=4)
    for index in (0, 777, 1999, 2000):
        block = index % 2000 // 200
        first = index // 2000 * 2000 + block * 200
        inside = {order.item_index(other) for other in range(first, first + 200)}
        replacements = [order.replacement_index(index, attempt) for attempt in range(1, 30)]
        assert set(replacements) <= inside and len(set(replacements)) > 15
        assert replacements == [order.replacement_index(index, attempt) for attempt in range(1, 30)]


def test_the_same_in_another_process() -> None:
    code = (
        "import numpy as np; from aki_megatron.data.shard_order import ShardOrder;"
        "o = ShardOrder(np.arange(1, 100), seed=7, shards_per_block=8);"
        "print([o.item_index(v) for v in (0, 99, 4949, 12345)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    order = ShardOrder(np.arange(1, 100), seed=7, shards_per_block=8)
    assert run.stdout.strip() == str([order.item_index(index) for index in (0, 99, 4949, 12345)])


def test_the_order_of_a_seed_never_changes() -> None:
    """A run that resumes after an upgrade must go on in the same order: recorded values."""
    order = ShardOrder(np.arange(1, 100), seed=7, shards_per_block=8)
    assert [order.item_index(index) for index in (0, 99, 4949, 12345)] == RECORDED


RECORDED = [2192, 1872, 3094, 303]


def test_the_middle_of_100_million_samples_is_found_by_arithmetic() -> None:
    counts = np.full(10_000, 10_000)
    start = time.perf_counter()
    order = ShardOrder(counts, seed=1)
    first = order.item_index(50_000_000)
    seconds = time.perf_counter() - start
    assert 0 <= first < 100_000_000
    assert seconds < 1.0, f"{seconds:.2f} s"
    samples = [order.item_index(index) for index in range(50_000_000, 50_010_000)]
    assert len(set(samples)) == 10_000
    assert len({sample // 10_000 for sample in samples}) <= 32  # 16 tars to a block, at most two blocks


def test_an_order_of_no_samples_is_refused() -> None:
    with pytest.raises(AssertionError):
        ShardOrder(np.zeros(3, dtype=np.int64), seed=1)
