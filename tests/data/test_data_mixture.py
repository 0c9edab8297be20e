"""The choice of sources and elements: bijections, exact shares, coverage, and the same everywhere."""

import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aki_megatron.data.mixture import Mixture, keyed, permute
from aki_megatron.errors import ConfigError

TABLE_4 = {f"source {n}": w for n, w in enumerate([0.103, 0.103, 0.026, 0.103, 0.103, 0.103, 0.103, 0.103, 0.103])} | {
    "vg": 0.047,
    "llava": 0.103,
}


@given(size=st.integers(1, 700), key=st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permutation_at_the_size_of_a_large_dataset() -> None:
    size = 100_000_007
    seen = {permute(index, size, 5) for index in range(49_990_000, 50_000_000)}
    assert len(seen) == 10_000 and all(0 <= place < size for place in seen)
    # scattered over the whole range: every tenth gets its share
    tenths = Counter(place * 10 // size for place in seen)
    assert all(850 < tenths[tenth] < 1150 for tenth in range(10))


@pytest.mark.parametrize("size", [2, 3, 5, 24, 1000])
def test_permutations_of_different_keys_look_random(size: int) -> None:
    draws = 4000
    places = Counter(
        permute(0, size, keyed("k", number)) * 8 // size if size > 8 else permute(0, size, keyed("k", number))
        for number in range(draws)
    )
    cells = min(size, 8)
    expected = draws / cells
    chi_square = sum((places[cell] - expected) ** 2 / expected for cell in range(cells))
    assert chi_square < 30  # 7 degrees of freedom at most: p < 1e-4


def test_shares_are_exact_in_every_block() -> None:
    mixture = Mixture(TABLE_4, seed=3)
    assert mixture.block == 1000 and dict(zip(mixture.names, mixture.places, strict=True))["vg"] == 47
    for block in (0, 7, 52_000):
        drawn = Counter(mixture.draw(n).source for n in range(1000 * block, 1000 * (block + 1)))
        assert [drawn[source] for source in range(11)] == list(mixture.places)


def test_shares_hold_over_any_stretch() -> None:
    mixture = Mixture({"a": 0.7, "b": 0.3}, seed=1)
    for first in (0, 333, 123_456):
        share = sum(mixture.draw(n).source == 0 for n in range(first, first + 2000)) / 2000
        assert abs(share - 0.7) < 0.05


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [3.14159265358979, 2.718281828], [1e6, 25.0], [0.1 + 0.2, 0.7]])
def test_any_positive_weights(weights: list[float]) -> None:
    mixture = Mixture({str(n): weight for n, weight in enumerate(weights)}, seed=0)
    assert 1000 <= mixture.block <= 100_000 and sum(mixture.places) == mixture.block
    for places, weight in zip(mixture.places, weights, strict=True):
        assert abs(places / mixture.block - weight / sum(weights)) <= 1 / mixture.block


def test_bad_weights_are_refused() -> None:
    for weights, says in (({}, "at least one"), ({"a": 0.0}, "positive"), ({"a": float("nan")}, "positive")):
        with pytest.raises(ConfigError, match=says):
            Mixture(weights, seed=0)
    with pytest.raises(ConfigError, match="weight 1.0 of b is below"):
        Mixture({"a": 1e9, "b": 1.0}, seed=0)


def test_every_element_once_per_pass_in_another_order() -> None:
    mixture = Mixture({"a": 0.6, "b": 0.4}, seed=5)
    sizes = (37, 12)
    visited: dict[int, list[int]] = {0: [], 1: []}
    for n in range(3000):
        draw = mixture.draw(n)
        visited[draw.source].append(draw.visit)
    for source, visits in visited.items():
        assert sorted(visits) == list(range(len(visits)))  # three whole blocks: every visit number once
        size = sizes[source]
        passes = [
            [mixture.element(source, visit, size) for visit in range(first, first + size)]
            for first in range(0, 3 * size, size)
        ]
        assert all(sorted(one) == list(range(size)) for one in passes)
        assert passes[0] != passes[1] != passes[2]


def test_a_seed_gives_another_order() -> None:
    one, other = (Mixture({"a": 0.5, "b": 0.5}, seed=seed) for seed in (1, 2))
    assert [one.draw(n) for n in range(50)] != [other.draw(n) for n in range(50)]
    assert [one.element(0, n, 99) for n in range(50)] != [other.element(0, n, 99) for n in range(50)]


def test_the_same_in_another_process() -> None:
    program = (
        "from aki_megatron.data.mixture import Mixture\n"
        "m = Mixture({'a': 0.7, 'b': 0.3}, seed=9)\n"
        "d = [m.draw(n) for n in range(40)]\n"
        "print([(x.source, m.element(x.source, x.visit, 1234), m.substitute(3, 1, 99)) for x in d])"
    )
    here = Mixture({"a": 0.7, "b": 0.3}, seed=9)
    draws = [here.draw(n) for n in range(40)]
    expected = [(d.source, here.element(d.source, d.visit, 1234), here.substitute(3, 1, 99)) for d in draws]
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-c", program]
        environment = {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(expected)


def test_positions_far_into_a_run_cost_nothing() -> None:
    mixture = Mixture(TABLE_4, seed=1)
    draw = mixture.draw(50_000_000_000)
    assert 0 <= mixture.element(draw.source, draw.visit, 100_000_000) < 100_000_000
