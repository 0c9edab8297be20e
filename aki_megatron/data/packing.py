"""Several samples in one row: which samples share a row is a pure function of their lengths and of a key.

The samples of a run are numbered. A block of K consecutive numbers is packed into rows by itself, nothing is carried
over to the next block, so (block, row) is the whole state and any row can be found without those before it.

Share of the places that hold no token, in percent, as ``tools/bench/packing.py --config configs/demo/sft.yaml``
measures it. Pretraining and fine-tuning lengths are made up after the papers' datasets, with 144 places per image.

                          row of 2048 places       row of 4096 places       row of 8192 places
    samples in a block     512 1024 2048 4096 8192   512 1024 2048 4096 8192   512 1024 2048 4096 8192
    pretraining, mean 234  1.6  0.9  0.7  0.5  0.4   2.5  0.8  0.5  0.5  0.3   2.5  2.5  0.8  0.4  0.2
    fine-tuning, mean 227  2.7  2.2  2.0  1.9  1.8   2.2  1.0  0.6  0.4  0.3   4.9  2.0  0.9  0.7  0.3
    narrow, 234 +- 8       4.2  4.0  3.7  3.6  3.6   2.5  0.8  0.8  0.4  0.3   2.5  2.5  0.8  0.6  0.4
    the demo's, mean 24   13.0  6.3  2.5  0.5  0.5  23.8 13.0  6.3  2.5  0.5  23.8 23.8 13.0  6.3  2.5

In rows of 4096 or more at K = 4096 hardly anything but the last row of a block is lost, half empty on average: 50 /
(rows of a block) percent. Very short samples make few rows; take 25 to a block or more (K >= 25 * row / mean length).
Lengths all alike cannot be combined: 230-token samples waste 4.5 % of a row of 4096, and nothing of one of 4140.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import accumulate

import numpy as np

from aki_megatron.data.mixture import keyed, permute
from aki_megatron.errors import DataError

BLOCK_SAMPLES = 4096
"""The default K: 98 % of the places hold tokens of the papers' datasets, for rows of 2048 to 8192 (the table above)."""

MOST_EMPTY_BLOCKS = 16
"""Blocks in a row without a sample after which a walk gives up: there is nothing to train on."""

_KEPT_BLOCKS = 3


@dataclass(frozen=True)
class Limits:
    """What a row holds at most: ``sequence_length`` places, image places included, and ``max_images`` images."""

    sequence_length: int
    max_images: int

    def __post_init__(self) -> None:
        if self.sequence_length < 1 or self.max_images < 0:
            raise ValueError(f"{self}: a row needs 1 place or more, and 0 images or more.")


def pack(lengths: Sequence[int], images: Sequence[int], limits: Limits) -> list[tuple[int, ...]]:
    """Rows as tuples of positions, every position in one row, ascending inside a row.

    lengths  places of each sample, 1 or more, image places included
    images   images of each sample

    The better of two heuristics, deterministic, 5 to 20 milliseconds for 4096 samples: rows of like fill and like
    composition (``_balanced``), and best fit decreasing where that takes fewer rows. The order of the rows follows
    the lengths: shuffle it before training. Raises ValueError for a sample that fits in no row.
    """
    if len(lengths) != len(images):
        raise ValueError(f"pack got {len(lengths)} lengths but {len(images)} numbers of images.")
    sizes = [int(length) for length in lengths]
    counts = [int(count) for count in images]
    for position, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if not (1 <= size <= limits.sequence_length and 0 <= count <= limits.max_images):
            raise ValueError(
                f"Sample {position} of the block has {size} tokens and {count} images; a row takes 1 to "
                f"{limits.sequence_length} tokens and at most {limits.max_images} images. Raise the row's limits, or "
                "lower the longest sample (text and image places together)."
            )
    if not sizes:
        return []
    order = np.argsort(-np.asarray(sizes), kind="stable").tolist()
    best = _best_fit(sizes, counts, limits, order)
    low, high = fewest_rows(sizes, counts, limits), len(best)
    while low <= high:  # the smallest number of rows that can be balanced; on a tie rows of like composition win
        middle = (low + high) // 2
        found = _balanced(sizes, counts, limits, order, middle)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle - 1
    return [tuple(sorted(row)) for row in best]


def fewest_rows(lengths: Sequence[int], images: Sequence[int], limits: Limits) -> int:
    """A number of rows below which nothing can be packed: by tokens, by images, and by samples."""
    most_samples = sum(total <= limits.sequence_length for total in accumulate(sorted(lengths)))
    needs = ((sum(lengths), limits.sequence_length), (sum(images), limits.max_images), (len(lengths), most_samples))
    return max(-(-amount // per_row) for amount, per_row in needs if amount)


def _balanced(
    sizes: list[int], images: list[int], limits: Limits, order: list[int], rows: int
) -> list[list[int]] | None:
    """Exactly ``rows`` rows, all about equally full; None where the heuristic finds no such packing.

    Every row is given a number of samples, the mean rounded down or up. The longest sample left goes to the row whose
    open places would have to be filled with the longest samples on average. So a row of 17 samples ends with longer
    ones than a row of 18, and a narrow range of lengths fills both, which best fit decreasing does not manage.
    """
    samples, longer = divmod(len(order), rows)
    if samples == 0:
        return None
    open_places = [samples + (row < longer) for row in range(rows)]
    room, image_room = [limits.sequence_length] * rows, [limits.max_images] * rows
    packed: list[list[int]] = [[] for _ in range(rows)]
    waiting = [(-room[row] / open_places[row], row) for row in range(rows)]  # IEEE division: equal on every machine
    heapify(waiting)
    no_images: list[tuple[float, int]] = []  # rows whose images are used up wait here for samples without one
    for position in order:
        count = images[position]
        heap = no_images if count == 0 and no_images and (not waiting or no_images[0] < waiting[0]) else waiting
        if not heap:
            return None
        _, row = heappop(heap)
        room[row] -= sizes[position]
        image_room[row] -= count
        open_places[row] -= 1
        if room[row] < 0 or image_room[row] < 0:
            return None
        packed[row].append(position)
        if open_places[row]:
            heappush(waiting if image_room[row] else no_images, (-room[row] / open_places[row], row))
    return packed


def _best_fit(sizes: list[int], images: list[int], limits: Limits, order: list[int]) -> list[list[int]]:
    """Best fit decreasing: each sample, the longest first, into the row it fills best, else into a new row."""
    packed: list[list[int]] = []
    image_room: list[int] = []
    # (room, row), ascending; rows whose images are used up stand apart, so that samples with an image skip them
    with_images: list[tuple[int, int]] = []
    without: list[tuple[int, int]] = []
    for position in order:
        size, count = sizes[position], images[position]
        shelf, at = with_images, bisect_left(with_images, (size, -1))
        while at < len(shelf) and image_room[shelf[at][1]] < count:
            at += 1
        if count == 0:
            other = bisect_left(without, (size, -1))
            if other < len(without) and (at == len(shelf) or without[other][0] <= shelf[at][0]):
                shelf, at = without, other
        if at < len(shelf):
            room, row = shelf.pop(at)
        else:
            room, row = limits.sequence_length, len(packed)
            packed.append([])
            image_room.append(limits.max_images)
        packed[row].append(position)
        image_room[row] -= count
        if room > size:
            insort(with_images if image_room[row] else without, (room - size, row))
    return packed


@dataclass(frozen=True, order=True)
class PackingState:
    """Where a run stands: the next row is number ``row`` of ``block``. Two integers are the whole state."""

    block: int = 0
    row: int = 0

    def __post_init__(self) -> None:
        if self.block < 0 or self.row < 0:
            raise ValueError(f"{self}: blocks and rows are counted from 0.")


class PackedSampler:
    """The rows of a run, endless: rows of block b hold the samples b*K ... b*K + K - 1, in a keyed order of rows.

    buffer_size  K
    key            orders the rows of a block (mixture.keyed of seed and phase): packing leaves them sorted by length,
                   which would bias what is learnt when
    measure        (length, images) of sample n, a pure function; length 0 leaves the sample out. A block is measured
                   as a whole, K calls, when its first row is asked for; the last few blocks are kept.
    """

    def __init__(
        self, measure: Callable[[int], tuple[int, int]], limits: Limits, *, buffer_size: int = BLOCK_SAMPLES, key: int
    ) -> None:
        if buffer_size < 1:
            raise ValueError(f"A block of {buffer_size} samples cannot be packed; it needs 1 or more.")
        self.limits = limits
        self.buffer_size = buffer_size
        self._measure = measure
        self._key = key
        self._blocks: OrderedDict[int, list[tuple[int, ...]]] = OrderedDict()

    def rows(self, block: int) -> list[tuple[int, ...]]:
        """The rows of a block as sample numbers, ascending in each row; do not change the list.

        Raises ValueError for a sample that fits in no row.
        """
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return self._blocks[block]
        first = block * self.buffer_size
        numbers, lengths, images = [], [], []
        for number in range(first, first + self.buffer_size):
            length, count = self._measure(number)
            if length:
                numbers.append(number)
                lengths.append(length)
                images.append(count)
        try:
            packed = pack(lengths, images, self.limits)
        except ValueError as error:
            raise ValueError(f"Samples {first} to {first + self.buffer_size - 1}: {error}") from error
        rows: list[tuple[int, ...]] = [()] * len(packed)
        key = keyed("rows", self._key, block)
        for index, row in enumerate(packed):
            rows[permute(index, len(packed), key)] = tuple(numbers[position] for position in row)
        self._blocks[block] = rows
        while len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return rows

    def walk(self, place: PackingState = PackingState()) -> Iterator[tuple[PackingState, tuple[int, ...]]]:  # noqa: B008 (frozen)
        """All rows from a place on, without end: (the place after the row, the row's sample numbers).

        Raises DataError for a place that the order does not have, and where whole blocks hold no sample at all.
        """
        block, row, empty = place.block, place.row, 0
        held = len(self.rows(block))
        if row > held:
            raise DataError(
                f"The packing state says row {row} of block {block}, but that block has {held} rows: data, seed or row "
                "limits differ from the run that wrote the state. Use the same ones, or start the data anew."
            )
        while empty < MOST_EMPTY_BLOCKS:
            rows = self.rows(block)
            for index in range(row, len(rows)):
                last = index + 1 == len(rows)
                yield PackingState(block + 1, 0) if last else PackingState(block, index + 1), rows[index]
            empty = 0 if rows else empty + 1
            block, row = block + 1, 0
        raise DataError(
            f"Blocks {block - empty} to {block - 1} ({empty * self.buffer_size} samples) hold no sample that can be "
            "trained on; the first losses counted say why."
        )
