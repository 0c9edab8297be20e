"""The order in which the samples of many tars are read: shuffled widely, yet few tars at a time.

Random access over 10,000 tars would open another tar for nearly every sample, which network disks and fetched tars
cannot serve. So every epoch permutes the tars, groups neighbours of that order into blocks, and permutes the samples
of a block. A draw is found by arithmetic: two searches in cumulative counts and one seeded permutation.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from aki_megatron.data.permutation import derive_seed, feistel_permute
from aki_megatron.hashing import splitmix64

_MAX_CACHED_EPOCHS = 2  # around the end of an epoch, workers that prefetch ask for both


@dataclass(frozen=True)
class _Epoch:
    """Tars in their order, the first draw of each tar, and the first draw of each block (and the end)."""

    shards: NDArray[np.int64]
    shard_starts: NDArray[np.int64]
    block_starts: NDArray[np.int64]


class ShardOrder:
    """Maps draw indices to sample indices, over tars of ``counts`` samples each: every sample once per epoch.

    shards_per_block  tars that are shuffled together (the blocks of an epoch differ by one tar at most); a sequential
                      reader has that many tars open, twice as many where two blocks meet
    name              tells apart the orders of several sets of tars in one run

    The only state is the draw index. Safe to share between threads.
    """

    def __init__(self, counts: NDArray[np.int64], *, seed: int, name: str = "captions", shards_per_block: int = 16):
        assert shards_per_block >= 1, shards_per_block
        self._counts = np.asarray(counts, dtype=np.int64)
        self._first_samples = np.concatenate(([0], np.cumsum(self._counts)))
        self._seed, self._name = seed, name
        self._num_blocks = max(1, -(-len(self._counts) // shards_per_block))
        self._epochs: dict[int, _Epoch] = {}
        assert len(self), "an order of no samples"

    def __len__(self) -> int:
        """Return the number of samples of one epoch."""
        return int(self._first_samples[-1])

    def item_index(self, draw_index: int) -> int:
        """Return the sample of draw 0, 1, 2, ... without end."""
        number, epoch, block, offset = self._locate(draw_index)
        start, size = self._block_range(epoch, block)
        seed = derive_seed("block", self._seed, self._name, number, block)
        return self._sample(epoch, start + feistel_permute(offset - start, size, seed))

    def replacement_index(self, draw_index: int, attempt: int) -> int:
        """Return the sample that replaces an unreadable one, at attempt 1, 2, ...: one of the same block of tars."""
        _, epoch, block, _ = self._locate(draw_index)
        start, size = self._block_range(epoch, block)
        return self._sample(
            epoch, start + derive_seed("substitute", self._seed, self._name, draw_index, attempt) % size
        )

    def _locate(self, draw_index: int) -> tuple[int, _Epoch, int, int]:
        """Return the number of the epoch, the epoch, the block and the offset inside the epoch."""
        number, offset = divmod(draw_index, len(self))
        epoch = self._epoch(number)
        return number, epoch, int(np.searchsorted(epoch.block_starts, offset, side="right")) - 1, offset

    @staticmethod
    def _block_range(epoch: _Epoch, block: int) -> tuple[int, int]:
        """Return the first draw of a block and its number of samples."""
        start = int(epoch.block_starts[block])
        return start, int(epoch.block_starts[block + 1]) - start

    def _sample(self, epoch: _Epoch, offset: int) -> int:
        """Return the sample at an offset into the epoch's tars laid end to end."""
        # side="right" skips tars without samples, which begin where the next one does
        position = int(np.searchsorted(epoch.shard_starts, offset, side="right")) - 1
        return int(self._first_samples[epoch.shards[position]]) + offset - int(epoch.shard_starts[position])

    def _epoch(self, number: int) -> _Epoch:
        epoch = self._epochs.get(number)
        if epoch is None:
            epoch = self._shuffle_shards(number)
            kept = dict(list(self._epochs.items())[1 - _MAX_CACHED_EPOCHS :])
            self._epochs = kept | {number: epoch}  # a new dict: other threads may be reading the old one
        return epoch

    def _shuffle_shards(self, number: int) -> _Epoch:
        num_shards = len(self._counts)
        seed = np.uint64(derive_seed("shards", self._seed, self._name, number))
        shards = np.argsort(splitmix64(np.arange(num_shards, dtype=np.uint64) ^ seed), kind="stable")
        starts = np.concatenate(([0], np.cumsum(self._counts[shards])))
        edges = np.arange(self._num_blocks + 1, dtype=np.int64) * num_shards // self._num_blocks
        return _Epoch(shards, starts, starts[edges])
