"""What processes tell each other without collectives."""

import pytest
from forked import exit_code, fork
from harness import free_port

from aki_megatron.errors import ConfigError
from aki_megatron.parallel.launch import Launch
from aki_megatron.parallel.shared_store import CHUNK_BYTES, SharedStore

LARGE = b"x" * (2 * CHUNK_BYTES + 7)


def launch(rank: int, world_size: int, port: int) -> Launch:
    return Launch(rank, rank, world_size, world_size, "environment", "127.0.0.1", port)


def test_one_process_alone() -> None:
    store = SharedStore.open(launch(0, 1, 0))
    store.publish("plan", {"large": LARGE})
    assert store.receive("plan") == {"large": LARGE}
    assert [store.next_number(name) for name in ("a", "a", "b", "a")] == [0, 1, 0, 2]
    assert store.statuses() == [{}]
    store.set_status({"answered": 3})
    assert store.statuses() == [{"answered": 3}]
    store.leave()


def test_several_processes_of_which_one_holds_the_store() -> None:
    port = free_port()

    def rank(number: int) -> bool:
        store = SharedStore.open(launch(number, 3, port), timeout_seconds=300)
        if number == 0:
            store.publish("plan", LARGE)
        assert store.receive("plan", timeout_seconds=300) == LARGE
        claimed = [store.next_number("blocks") for _ in range(50)]
        store.set_status({"claimed": claimed})
        store.next_number("done")
        while number == 0 and not all(store.statuses()):
            pass
        if number == 0:
            taken = [each for status in store.statuses() for each in status["claimed"]]
            assert sorted(taken) == list(range(150)), "each number goes to one process"
        store.leave()
        return True

    children = [fork(lambda number=number: rank(number)) for number in range(3)]  # type: ignore[misc]
    assert [exit_code(child) for child in children] == [0, 0, 0]


def test_processes_that_do_not_come_are_an_error() -> None:
    with pytest.raises(ConfigError, match="not all 2 processes met at tcp://127.0.0.1"):
        SharedStore.open(launch(0, 2, free_port()), timeout_seconds=1)
