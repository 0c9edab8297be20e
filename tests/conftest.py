"""Fixtures of all tests: the pool of ranks. How tests are distributed over xdist workers (`make test` runs several)."""

import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Pool

GROUPS = ("tests/slurm/", "tests/distributed/")
"""Folders whose tests share one xdist worker: one Slurm cluster, one pool of ranks. Elsewhere a file is a group."""

FIRST = (
    "tests/distributed/",
    "tests/slurm/",
    "tests/end_to_end/",
    "tests/parity/",
    "tests/checkpoint/",
)
"""Tests that start first, by prefix: the longest group, that of Slurm, which mostly waits, then long files."""


def pytest_configure() -> None:
    """Let tests and the processes that they start get signals which nohup or a shell without job control ignores."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_sessionstart() -> None:
    """Refuse two test files of one name: each would be collected in some workers and fail in others."""
    counts = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise pytest.UsageError(f"test files need names of their own: {', '.join(twice)}")


def group_of(nodeid: str) -> str:
    """The group of a test."""
    file = nodeid.partition("::")[0]
    return next((folder for folder in GROUPS if file.startswith(folder)), file)


def priority(nodeid: str) -> int:
    return next((rank for rank, prefix in enumerate(FIRST) if nodeid.startswith(prefix)), len(FIRST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand whole groups to workers. xdist's own loadgroup cannot: it writes Item._nodeid, which pytest 9.2 ignores."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put what takes long first; without xdist the order stays that of the files."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: priority(item.nodeid))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """The one pool of this pytest run (of this xdist worker)."""
    workers = Pool()
    yield workers
    workers.close()


@pytest.fixture
def run_on(pool: Pool) -> Callable[..., list[Any]]:
    """``run_on(ranks, function, *args)``: results of ``function(topology, *args)`` by rank, in a fresh world.

    ``tensor=`` and ``pipeline=`` split the world.
    """
    return pool.run
