"""How a global batch is divided over ranks and micro-batches, and what does not fit."""

import pytest
from demo_runs import load

from aki_megatron.config.batch_sizes import (
    check_world,
    data_parallel_size,
    micro_batch_size,
    num_microbatches,
    num_replicas,
)
from aki_megatron.errors import ConfigError

WORLDS: list[tuple[list[str], int, list[str]]] = [
    ([], 3, ["train.global_batch_size=64", "3 data-parallel ranks", "63 or 66", "[1, 2]"]),
    (["--train.global_batch_size", "7"], 2, ["train.global_batch_size=7", "6 or 8", "[1]"]),
]


@pytest.mark.parametrize(("argv", "ranks", "expected"), WORLDS)
def test_runs_that_do_not_fit_the_ranks(argv: list[str], ranks: int, expected: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_world(load(*argv), ranks)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("batch", "most", "ranks", "got"), [(64, 32, 2, 32), (64, 32, 4, 16), (16, 32, 8, 2), (64, 24, 1, 16), (7, 4, 1, 1)]
)
def test_micro_batch_is_the_most_that_fits(batch: int, most: int, ranks: int, got: int) -> None:
    run = load("--train.global_batch_size", str(batch), "--train.micro_batch_size", str(most))
    check_world(run, ranks)
    assert micro_batch_size(run, ranks) == got


def test_replicas_that_do_not_fit_the_ranks() -> None:
    split = load("--parallel.tensor", "4", "--parallel.pipeline", "2")
    with pytest.raises(ConfigError, match=r"12 ranks .*parallel\.tensor=4 x parallel\.pipeline=2 = 8.*start 8 or 16"):
        check_world(split, 12)
    with pytest.raises(ConfigError, match=r"^4 ranks .* start 8 ranks"):
        check_world(split, 4)
    check_world(split, 16)


@pytest.mark.parametrize(("ranks", "replicas"), [(8, 1), (16, 2), (64, 8)])
def test_a_replica_counts_as_one_data_rank(ranks: int, replicas: int) -> None:
    spread = load("--parallel.tensor", "4", "--parallel.pipeline", "2")
    alone = load()
    check_world(spread, ranks)
    assert data_parallel_size(spread, ranks) == data_parallel_size(alone, replicas) == replicas
    assert micro_batch_size(spread, ranks) == micro_batch_size(alone, replicas)


def test_runs_that_fit() -> None:
    for ranks in (1, 2):
        check_world(load(), ranks)


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (1, 3), (2, 4)])
def test_sizes_that_do_not_divide_the_world(tensor: int, pipeline: int) -> None:
    with pytest.raises(ConfigError, match=f"4 ranks.*parallel.tensor={tensor} x parallel.pipeline={pipeline}"):
        num_replicas(4, tensor=tensor, pipeline=pipeline)


def test_the_factors_of_a_global_batch() -> None:
    run = load("--train.global_batch_size", "96", "--train.micro_batch_size", "10", "--parallel.tensor", "2")
    for ranks in (2, 4, 8, 16):
        factors = data_parallel_size(run, ranks), num_microbatches(run, ranks), micro_batch_size(run, ranks)
        assert factors[0] * factors[1] * factors[2] == 96, factors
