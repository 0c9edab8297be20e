"""In which order the samples of many tars are visited: shuffled widely, yet few tars at a time.

Random access over 10,000 tars would open another tar for nearly every sample, which network disks and fetched tars
cannot bear. So every pass permutes the tars, cuts them into blocks of neighbours in that order, and permutes the
samples inside a block. A visit is found by arithmetic: two searches in cumulative counts and one keyed permutation.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.mixture import keyed, permute

_KEPT_PASSES = 2  # at the seam of two passes, workers that prefetch ask for both

_GOLDEN, _FIRST, _SECOND = (np.uint64(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class _Pass:
    """One pass: tars in their order, where each begins in the visits of the pass, and where each block does."""

    shards: NDArray[np.int64]
    starts: NDArray[np.int64]
    blocks: NDArray[np.int64]


class ShardOrder:
    """Visit number -> sample number, over tars of ``counts`` samples each: every sample once per pass.

    ``shards_per_block`` tars are shuffled together (the blocks of a pass differ by one tar at most); a reader that
    follows the visits has that many tars in hand, twice as many at a seam. ``name`` tells apart the orders of several
    sets of tars in one run. The state is nothing but the number of the visit. Safe to share between threads.
    """

    def __init__(self, counts: NDArray[np.int64], *, seed: int, name: str = "captions", shards_per_block: int = 16):
        assert shards_per_block >= 1, shards_per_block
        self._counts = np.asarray(counts, dtype=np.int64)
        self._firsts = np.concatenate(([0], np.cumsum(self._counts)))
        self._seed, self._name = seed, name
        self._num_blocks = max(1, -(-len(self._counts) // shards_per_block))
        self._passes: dict[int, _Pass] = {}
        assert len(self), "an order of no samples"

    def __len__(self) -> int:
        """Samples in one pass."""
        return int(self._firsts[-1])

    def element(self, visit: int) -> int:
        """The sample that the visit (0, 1, 2, ... without end) meets."""
        number, inside = divmod(visit, len(self))
        order = self._pass(number)
        block = int(np.searchsorted(order.blocks, inside, side="right")) - 1
        first = int(order.blocks[block])
        size = int(order.blocks[block + 1]) - first
        key = keyed("block", self._seed, self._name, number, block)
        return self._sample(order, first + permute(inside - first, size, key))

    def substitute(self, visit: int, attempt: int) -> int:
        """The sample that stands in for an unreadable one, at attempt 1, 2, ...: of the same block of tars."""
        number, inside = divmod(visit, len(self))
        order = self._pass(number)
        block = int(np.searchsorted(order.blocks, inside, side="right")) - 1
        first = int(order.blocks[block])
        size = int(order.blocks[block + 1]) - first
        return self._sample(order, first + keyed("substitute", self._seed, self._name, visit, attempt) % size)

    def _sample(self, order: _Pass, place: int) -> int:
        """The sample at a place of the pass's tars laid end to end."""
        # side="right" passes over tars without samples, which begin where the next one does
        position = int(np.searchsorted(order.starts, place, side="right")) - 1
        return int(self._firsts[order.shards[position]]) + place - int(order.starts[position])

    def _pass(self, number: int) -> _Pass:
        order = self._passes.get(number)
        if order is None:
            order = self._arrange(number)
            kept = dict(list(self._passes.items())[1 - _KEPT_PASSES :])
            self._passes = kept | {number: order}  # a new dict: other threads may be reading the old one
        return order

    def _arrange(self, number: int) -> _Pass:
        size = len(self._counts)
        scattered = _mix(np.arange(size, dtype=np.uint64) ^ np.uint64(keyed("shards", self._seed, self._name, number)))
        shards = np.argsort(scattered, kind="stable")
        starts = np.concatenate(([0], np.cumsum(self._counts[shards])))
        edges = np.arange(self._num_blocks + 1, dtype=np.int64) * size // self._num_blocks
        return _Pass(shards, starts, starts[edges])


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """As mixture.mix, for many values at once."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
