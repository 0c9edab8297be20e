"""The choice of sources and items: bijections, exact proportions, coverage, and the same numbers everywhere."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aki_megatron.data.mixture import Mixture, SourcePass
from aki_megatron.data.permutation import derive_seed, feistel_permute
from aki_megatron.errors import ConfigError

TABLE_4 = {f"source {n}": w for n, w in enumerate([0.103, 0.103, 0.026, 0.103, 0.103, 0.103, 0.103, 0.103, 0.103])} | {
    "vg": 0.047,
    "llava": 0.103,
}


@given(size=st.integers(1, 700), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    assert sorted(feistel_permute(index, size, seed) for index in range(size)) == list(range(size))


def test_permutation_at_the_size_of_a_large_dataset() -> None:
    size = 100_000_007
    indices = {feistel_permute(index, size, 5) for index in range(49_990_000, 50_000_000)}
    assert len(indices) == 10_000 and all(0 <= index < size for index in indices)
    # scattered over the whole range: about as many in every tenth
    tenths = Counter(index * 10 // size for index in indices)
    assert all(850 < tenths[tenth] < 1150 for tenth in range(10))


@pytest.mark.parametrize("size", [2, 3, 5, 24, 1000])
def test_permutations_of_different_seeds_look_random(size: int) -> None:
    draws = 4000
    images = Counter(
        feistel_permute(0, size, derive_seed("k", number)) * 8 // size
        if size > 8
        else feistel_permute(0, size, derive_seed("k", number))
        for number in range(draws)
    )
    cells = min(size, 8)
    expected = draws / cells
    chi_square = sum((images[cell] - expected) ** 2 / expected for cell in range(cells))
    assert chi_square < 30  # 7 degrees of freedom at most: p < 1e-4


def test_proportions_are_exact_in_every_block() -> None:
    mixture = Mixture(TABLE_4, seed=3)
    assert mixture.block_size == 1000 and dict(zip(mixture.names, mixture.counts_per_block, strict=True))["vg"] == 47
    for block in (0, 7, 52_000):
        sources = Counter(mixture.draw(n).source for n in range(1000 * block, 1000 * (block + 1)))
        assert [sources[source] for source in range(11)] == list(mixture.counts_per_block)


def test_proportions_hold_over_any_range() -> None:
    mixture = Mixture({"a": 0.7, "b": 0.3}, seed=1)
    for first in (0, 333, 123_456):
        fraction = sum(mixture.draw(n).source == 0 for n in range(first, first + 2000)) / 2000
        assert abs(fraction - 0.7) < 0.05


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.14159265358979, 2.718281828], [1e6, 25.0], [0.1 + 0.2, 0.7]])
def test_any_positive_weights(weights: list[float]) -> None:
    mixture = Mixture({str(n): weight for n, weight in enumerate(weights)}, seed=0)
    assert 1000 <= mixture.block_size <= 100_000 and sum(mixture.counts_per_block) == mixture.block_size
    for count, weight in zip(mixture.counts_per_block, weights, strict=True):
        assert abs(count / mixture.block_size - weight / sum(weights)) <= 1 / mixture.block_size


def test_bad_weights_are_refused() -> None:
    for weights, message in (({}, "at least one"), ({"a": 0.0}, "positive"), ({"a": float("nan")}, "positive")):
        with pytest.raises(ConfigError, match=message):
            Mixture(weights, seed=0)
    with pytest.raises(ConfigError, match="weight 1.0 of b is below"):
        Mixture({"a": 1e9, "b": 1.0}, seed=0)


def test_every_item_once_per_epoch_in_another_order() -> None:
    mixture = Mixture({"a": 0.6, "b": 0.4}, seed=5)
    sizes = (37, 12)
    draws: dict[int, list[int]] = {0: [], 1: []}
    for n in range(3000):
        draw = mixture.draw(n)
        draws[draw.source].append(draw.draw_index)
    for source, indices in draws.items():
        assert sorted(indices) == list(range(len(indices)))  # three whole blocks: every draw index once
        size = sizes[source]
        epochs = [
            [mixture.item_index(source, index, size) for index in range(first, first + size)]
            for first in range(0, 3 * size, size)
        ]
        assert all(sorted(one) == list(range(size)) for one in epochs)
        assert epochs[0] != epochs[1] != epochs[2]


def test_a_seed_gives_another_order() -> None:
    one, other = (Mixture({"a": 0.5, "b": 0.5}, seed=seed) for seed in (1, 2))
    assert [one.draw(n) for n in range(50)] != [other.draw(n) for n in range(50)]
    assert [one.item_index(0, n, 99) for n in range(50)] != [other.item_index(0, n, 99) for n in range(50)]


def test_the_same_in_another_process() -> None:
    program = (
        "from aki_megatron.data.mixture import Mixture\n"
        "m = Mixture({'a': 0.7, 'b': 0.3}, seed=9)\n"
        "d = [m.draw(n) for n in range(40)]\n"
        "print([(x.source, m.item_index(x.source, x.draw_index, 1234), m.replacement_index(3, 1, 99)) for x in d])"
    )
    here = Mixture({"a": 0.7, "b": 0.3}, seed=9)
    draws = [here.draw(n) for n in range(40)]
    expected = [
        (d.source, here.item_index(d.source, d.draw_index, 1234), here.replacement_index(3, 1, 99)) for d in draws
    ]
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-c", program]
        environment = {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(expected)


def test_a_draw_far_into_a_run_costs_nothing() -> None:
    mixture = Mixture(TABLE_4, seed=1)
    draw = mixture.draw(50_000_000_000)
    assert 0 <= mixture.item_index(draw.source, draw.draw_index, 100_000_000) < 100_000_000


def test_the_numbers_of_a_seed_never_change() -> None:
    """A run that resumes after an upgrade must go on with the same samples: recorded values."""
    assert derive_seed("mixture", 3, 7) == 12601322864309573730
    assert [feistel_permute(index, 7, 3) for index in range(7)] == [3, 0, 2, 5, 1, 6, 4]
    assert feistel_permute(99, 100_000_007, 5) == 23517402
    mixture = Mixture({"a": 0.7, "b": 0.3}, seed=9)
    draws = [mixture.draw(n) for n in range(4)]
    assert [(draw.source, draw.draw_index) for draw in draws] == [(0, 404), (0, 639), (0, 627), (1, 143)]
    assert [mixture.item_index(draw.source, draw.draw_index, 1234) for draw in draws] == [162, 776, 336, 267]
    assert [mixture.replacement_index(n, 2, 99) for n in range(4)] == [46, 33, 74, 66]


def visits(mixture: Mixture, name: str, num_items: int, count: int) -> list[int]:
    """Return the items that the first ``count`` draws of a source take, in the order of the samples."""
    source, items, n = mixture.names.index(name), [], 0
    while len(items) < count:
        draw = mixture.draw(n)
        if draw.source == source:
            items.append(mixture.item_index(source, draw.draw_index, num_items))
        n += 1
    return items


@pytest.mark.parametrize("num_items", [1, 3, 40, 102])
def test_a_small_source_meets_every_item_once_per_epoch_in_the_order_of_the_samples(num_items: int) -> None:
    """By the permuted order of its block, 40 draws would meet 28 of 40 items."""
    mixture = Mixture(TABLE_4, seed=3, num_items={"source 0": num_items})
    items = visits(mixture, "source 0", num_items, 8 * num_items)
    for first in range(0, 8 * num_items, num_items):
        assert sorted(items[first : first + num_items]) == list(range(num_items))
    if num_items == 40:
        assert len(set(visits(Mixture(TABLE_4, seed=3), "source 0", 40, 40))) < 32


def test_larger_sources_keep_their_order() -> None:
    plain = Mixture(TABLE_4, seed=3)
    sizes = dict.fromkeys(TABLE_4, 103) | {"source 2": 5}
    small = TABLE_4.keys() - {"source 2"}
    mixture = Mixture(TABLE_4, seed=3, num_items=sizes)
    for n in [*range(2000), *range(10**9, 10**9 + 500)]:
        one, other = plain.draw(n), mixture.draw(n)
        assert one.source == other.source and (one == other or mixture.names[one.source] not in small)


def draws_of(mixture: Mixture, num_samples: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {name: [] for name in mixture.names}
    for n in range(num_samples):
        draw = mixture.draw(n)
        found[mixture.names[draw.source]].append(draw.draw_index)
    return found


@given(
    lengths=st.lists(st.integers(0, 4000), min_size=1, max_size=4),
    shares=st.lists(st.sampled_from([(1.0, 1.0), (0.7, 0.3), (0.25, 0.5)]), min_size=5, max_size=5),
    sizes=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
)
@settings(max_examples=25, deadline=None)
def test_phases_go_on_with_a_source_where_the_earlier_ones_stopped(
    lengths: list[int], shares: list[tuple[float, float]], sizes: tuple[int, int]
) -> None:
    passes: dict[str, SourcePass] = {}
    drawn: dict[str, list[int]] = {"a": [], "b": []}
    for number, (length, share) in enumerate(zip([*lengths, 5000], shares, strict=False)):
        weights = dict(zip("ab", share, strict=True))
        mixture = Mixture(weights, seed=number, passes=passes, num_items=dict(zip("ab", sizes, strict=True)))
        for name, draws in draws_of(mixture, length).items():
            drawn[name] += draws
        passes |= mixture.passes_after(length)
    for name, draws in drawn.items():
        left = passes[name].left
        assert passes[name].seed == 0 and sorted([*draws, *left]) == list(range(passes[name].next_draw))


def test_a_phase_of_one_source_goes_on_in_order() -> None:
    first = Mixture({"a": 1.0}, seed=5)
    second = Mixture({"a": 1.0}, seed=6, passes=first.passes_after(1234))
    assert [second.draw(n).draw_index for n in range(3000)] == list(range(1234, 4234))
    assert second.item_index(0, 1234, 99) == first.item_index(0, 1234, 99)


def test_draws_of_small_sources_in_any_order_count_each_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packing asks for samples of several blocks in turn, and so do workers at a border."""
    calls = 0

    def counted(index: int, size: int, seed: int) -> int:
        nonlocal calls
        calls += 1
        return feistel_permute(index, size, seed)

    monkeypatch.setattr("aki_megatron.data.mixture.feistel_permute", counted)
    mixture = Mixture({"small": 0.5, "large": 0.5}, seed=1, num_items={"small": 20, "large": 10**6})
    numbers = [n for offset in range(100) for n in range(offset, 5 * mixture.block_size, mixture.block_size)]
    for n in numbers:
        mixture.draw(n)
    assert calls == 5 * mixture.block_size + len(numbers)
