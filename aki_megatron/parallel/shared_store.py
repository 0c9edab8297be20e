"""What the processes of one start tell each other without collectives: objects, counters, who is where.

A process that is slow or has ended holds up nobody: there is nothing in which all take part at the same time but
``SharedStore.open`` itself. Torch's key-value store carries it, on the address at which ranks meet for training too;
it pickles objects, as torch's collectives do: the processes of a start trust each other.
"""

import json
import pickle
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from aki_megatron.errors import ConfigError
from aki_megatron.parallel.launch import Launch

CHUNK_BYTES = 2**22
"""Objects are sent in parts: the store takes at most 8 MiB at a time."""

PREFIX = "aki_megatron"


class SharedStore:
    """Objects and counters by name, the same for all processes of a start."""

    def __init__(self, store: Store, rank: int = 0, world_size: int = 1) -> None:
        """Use a store that all ``world_size`` processes reach."""
        self.rank, self.world_size = rank, world_size
        self._store = PrefixStore(PREFIX, store)

    @classmethod
    def open(cls, launch: Launch, timeout_seconds: float = 1800.0) -> "SharedStore":
        """Meet the other processes of a start; return when all are there.

        Raises ConfigError when they are not within ``timeout_seconds``.
        """
        if launch.world_size == 1:
            return cls.open_alone()
        url = f"tcp://{launch.master_address}:{launch.master_port}"
        wait = timedelta(seconds=timeout_seconds)
        try:
            store, _, _ = next(rendezvous(url, launch.rank, launch.world_size, timeout=wait))
        except (DistError, OSError) as error:
            raise ConfigError(
                f"{launch.launcher}: not all {launch.world_size} processes met at {url} within {timeout_seconds:.0f} s "
                f"({error}). Start them together, and set MASTER_ADDR and MASTER_PORT to a free port of rank 0's host."
            ) from error
        return cls(store, launch.rank, launch.world_size)

    @classmethod
    def open_alone(cls) -> "SharedStore":
        """Return the store of a process that has no others."""
        return cls(HashStore())

    def publish(self, name: str, value: object) -> None:
        """Give all processes a value that pickles; one of them, once for each name."""
        content = pickle.dumps(value)
        parts = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
        for number, part in enumerate(parts):
            self._store.set(f"{name}/{number}", part)  # type: ignore[arg-type]  # takes bytes, too
        self._store.set(name, str(len(parts)))  # last: who sees it sees all parts

    def receive(self, name: str, timeout_seconds: float = 86400.0) -> Any:
        """Wait for a published value. Raises DistError when it does not come, or rank 0 has ended."""
        self._store.wait([name], timedelta(seconds=timeout_seconds))
        count = int(self._store.get(name))
        return pickle.loads(b"".join(self._store.get(f"{name}/{number}") for number in range(count)))

    def next_number(self, name: str) -> int:
        """Return 0, 1, 2 ...: each number to one caller, whichever process it is."""
        return self._store.add(name, 1) - 1

    def set_status(self, status: Mapping[str, Any]) -> None:
        """Tell the others how far this process is; the JSON values of the last call count."""
        self._store.set(f"status/{self.rank}", json.dumps(status))

    def statuses(self) -> list[dict[str, Any]]:
        """Return the last status of every process by rank; an empty one where it has set none."""
        names = [f"status/{rank}" for rank in range(self.world_size)]
        return [json.loads(self._store.get(name)) if self._store.check([name]) else {} for name in names]

    def leave(self, timeout_seconds: float = 30.0) -> None:
        """End together: rank 0, which may hold the store, waits until the others have called this, or for a while."""
        try:
            count = self._store.add("left", 1)
            end = time.monotonic() + timeout_seconds
            while self.rank == 0 and count < self.world_size and time.monotonic() < end:
                time.sleep(0.05)
                count = self._store.add("left", 0)
        except DistError:
            assert self.rank, "rank 0 has the store, or its launcher does"
