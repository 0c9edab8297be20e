"""Fixtures of all tests: the pool of worker processes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from harness import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The one pool of this pytest run."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture
def run_on(pool: Pool) -> Callable[..., list[Any]]:
    """``run_on(ranks, function, *args)``: results of ``function(topology, *args)`` by rank, in a fresh world.

    ``tensor=`` and ``pipeline=`` split the world.
    """
    return pool.run
