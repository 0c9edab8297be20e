"""The order of the samples of many tars: everything once per pass, few tars at a time, any visit by arithmetic."""

import subprocess
import sys
import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aki_megatron.data.mixture import mix
from aki_megatron.data.shard_order import ShardOrder, _mix

COUNTS = st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(any)


@given(counts=COUNTS, width=st.integers(1, 50), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_sample_once_per_pass(counts: list[int], width: int, seed: int) -> None:
    order = ShardOrder(np.array(counts), seed=seed, shards_per_block=width)
    size = sum(counts)
    assert len(order) == size
    for first in (0, size, 7 * size):
        assert sorted(order.element(first + inside) for inside in range(size)) == list(range(size))


@given(counts=COUNTS, width=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_a_block_is_finished_before_the_next_begins(counts: list[int], width: int) -> None:
    order = ShardOrder(np.array(counts), seed=1, shards_per_block=width)
    ends = np.cumsum(counts)
    shards = [int(np.searchsorted(ends, order.element(visit), side="right")) for visit in range(sum(counts))]
    first = {shard: shards.index(shard) for shard in set(shards)}
    last = {shard: len(shards) - 1 - shards[::-1].index(shard) for shard in set(shards)}
    for visit in range(len(shards)):  # tars that are begun and not finished
        assert sum(first[shard] <= visit <= last[shard] for shard in first) <= width


def test_visits_do_not_depend_on_what_was_asked_before() -> None:
    counts = np.array([5, 0, 9, 1, 12, 7])
    one = ShardOrder(counts, seed=3, shards_per_block=2)
    forward = [one.element(visit) for visit in range(170)]
    other = ShardOrder(counts, seed=3, shards_per_block=2)
    assert [other.element(visit) for visit in reversed(range(170))][::-1] == forward
    assert len(other._passes) <= 2


def test_seed_name_and_pass_change_the_order() -> None:
    counts = np.full(10, 10)

    def visits(first: int = 0, **keys) -> list[int]:
        order = ShardOrder(counts, **({"seed": 1, "shards_per_block": 3} | keys))
        return [order.element(first + visit) for visit in range(100)]

    others = [visits(100), visits(seed=2), visits(name="ocr"), visits(shards_per_block=4)]
    assert all(other != visits() for other in others)
    assert visits() == visits()


def test_shuffled_well_inside_a_block() -> None:
    order = ShardOrder(np.full(64, 100), seed=5, shards_per_block=16)
    block = [order.element(visit) for visit in range(1600)]
    steps = np.abs(np.diff(block))
    assert np.mean([a // 100 == b // 100 for a, b in pairwise(block)]) < 0.1  # 1/16 by chance
    assert np.mean(steps == 1) < 0.01
    tars = {element // 100 for element in block}
    assert len(tars) == 16 and tars != set(range(16))


def test_blocks_are_of_equal_width() -> None:
    order = ShardOrder(np.ones(33, dtype=np.int64), seed=0, shards_per_block=16)
    assert sorted(np.diff(order._pass(0).blocks)) == [11, 11, 11]


def test_a_substitute_comes_from_the_same_block() -> None:
    order = ShardOrder(np.full(40, 50), seed=2, shards_per_block=4)
    for visit in (0, 777, 1999, 2000):
        block = visit % 2000 // 200
        first = visit // 2000 * 2000 + block * 200
        inside = {order.element(other) for other in range(first, first + 200)}
        drawn = [order.substitute(visit, attempt) for attempt in range(1, 30)]
        assert set(drawn) <= inside and len(set(drawn)) > 15
        assert drawn == [order.substitute(visit, attempt) for attempt in range(1, 30)]


def test_the_same_in_another_process() -> None:
    code = (
        "import numpy as np; from aki_megatron.data.shard_order import ShardOrder;"
        "o = ShardOrder(np.arange(1, 100), seed=7, shards_per_block=8);"
        "print([o.element(v) for v in (0, 99, 4949, 12345)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    order = ShardOrder(np.arange(1, 100), seed=7, shards_per_block=8)
    assert run.stdout.strip() == str([order.element(visit) for visit in (0, 99, 4949, 12345)])


def test_the_order_of_a_seed_never_changes() -> None:
    """A run that resumes after an upgrade must go on in the same order: recorded once, checked for ever."""
    order = ShardOrder(np.arange(1, 100), seed=7, shards_per_block=8)
    assert [order.element(visit) for visit in (0, 99, 4949, 12345)] == RECORDED


RECORDED = [2192, 1872, 3094, 303]


@given(values=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_the_vector_form_of_mix_is_mix(values: list[int]) -> None:
    assert _mix(np.array(values, dtype=np.uint64)).tolist() == [mix(value) for value in values]


def test_the_middle_of_100_million_samples_is_found_by_arithmetic() -> None:
    counts = np.full(10_000, 10_000)
    start = time.perf_counter()
    order = ShardOrder(counts, seed=1)
    first = order.element(50_000_000)
    seconds = time.perf_counter() - start
    assert 0 <= first < 100_000_000
    assert seconds < 1.0, f"{seconds:.2f} s"
    visits = [order.element(visit) for visit in range(50_000_000, 50_010_000)]
    assert len(set(visits)) == 10_000
    assert len({element // 10_000 for element in visits}) <= 32  # 16 tars to a block, at most two blocks


def test_no_samples_at_all_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        ShardOrder(np.zeros(3, dtype=np.int64), seed=1)
