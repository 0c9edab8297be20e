"""Sample packing: which samples share a sequence is a pure function of their lengths and of a seed.

The samples of a run are numbered. A block of K consecutive samples is packed into sequences by itself, nothing is
carried over to the next block, so (block, sequence) is the whole state and any sequence is found without those before.

Percentage of the positions that hold no token, as ``tools/bench/packing.py --config configs/demo/sft.yaml`` measures
it. Pretraining and fine-tuning lengths are synthetic, after the papers' datasets, with 144 positions per image.

                            sequence length 2048       sequence length 4096       sequence length 8192
    samples in a block     512 1024 2048 4096 8192   512 1024 2048 4096 8192   512 1024 2048 4096 8192
    pretraining, mean 234  1.6  0.9  0.7  0.5  0.4   2.5  0.8  0.5  0.5  0.3   2.5  2.5  0.8  0.4  0.2
    fine-tuning, mean 227  2.7  2.2  2.0  1.9  1.8   2.2  1.0  0.6  0.4  0.3   4.9  2.0  0.9  0.7  0.3
    narrow, 234 +- 8       4.2  4.0  3.7  3.6  3.6   2.5  0.8  0.8  0.4  0.3   2.5  2.5  0.8  0.6  0.4
    the demo's, mean 24   13.0  6.3  2.5  0.5  0.5  23.8 13.0  6.3  2.5  0.5  23.8 23.8 13.0  6.3  2.5

At 4096 positions or more and K = 4096, hardly anything but the last sequence of a block is padded, half of it on
average: 50 / (sequences of a block) percent. Very short samples make few sequences; use 25 to a block or more
(K >= 25 * sequence length / mean length). Samples of nearly one length cannot be combined: 230-token samples pad 4.5 %
of a sequence of 4096, and nothing of one of 4140.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import accumulate

import numpy as np

from aki_megatron.data.permutation import derive_seed, feistel_permute
from aki_megatron.errors import DataError

DEFAULT_BUFFER_SIZE = 4096
"""The default K: 98 % of the positions hold tokens of the papers' datasets, for 2048 to 8192 (the table above)."""

MAX_EMPTY_BLOCKS = 16
"""Consecutive blocks without a sample after which iteration stops with an error: there is nothing to train on."""

_MAX_CACHED_BLOCKS = 3


@dataclass(frozen=True)
class PackingLimits:
    """Most positions (those of images included) and most images of a sequence."""

    sequence_length: int
    max_images: int

    def __post_init__(self) -> None:
        if self.sequence_length < 1 or self.max_images < 0:
            raise ValueError(f"{self}: a sequence needs 1 position or more, and 0 images or more.")


def pack(lengths: Sequence[int], images: Sequence[int], limits: PackingLimits) -> list[tuple[int, ...]]:
    """Pack samples into sequences: return tuples of sample indices, ascending, every index in one sequence.

    lengths  positions of each sample, 1 or more, those of images included
    images   images of each sample

    The better of two heuristics, deterministic, 5 to 20 milliseconds for 4096 samples: sequences of like fill and like
    composition (``_balanced``), and best-fit decreasing where that takes fewer sequences. The order of the sequences
    follows the lengths: shuffle it before training. Raises ValueError for a sample that fits in no sequence.
    """
    if len(lengths) != len(images):
        raise ValueError(f"pack got {len(lengths)} lengths but {len(images)} numbers of images.")
    sizes = [int(length) for length in lengths]
    counts = [int(count) for count in images]
    for index, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        if not (1 <= size <= limits.sequence_length and 0 <= count <= limits.max_images):
            raise ValueError(
                f"Sample {index} of the block has {size} tokens and {count} images; a sequence takes 1 to "
                f"{limits.sequence_length} tokens and at most {limits.max_images} images. Raise the limits, or "
                "lower the longest sample (text and image positions together)."
            )
    if not sizes:
        return []
    order = np.argsort(-np.asarray(sizes), kind="stable").tolist()
    best = _best_fit(sizes, counts, limits, order)
    low, high = min_num_sequences(sizes, counts, limits), len(best)
    while low <= high:  # binary search for the smallest balanced packing; on a tie sequences of like composition win
        middle = (low + high) // 2
        found = _balanced(sizes, counts, limits, order, middle)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle - 1
    return [tuple(sorted(sequence)) for sequence in best]


def min_num_sequences(lengths: Sequence[int], images: Sequence[int], limits: PackingLimits) -> int:
    """Return a lower bound of the number of sequences: by tokens, by images, and by samples."""
    most_samples = sum(total <= limits.sequence_length for total in accumulate(sorted(lengths)))
    needs = ((sum(lengths), limits.sequence_length), (sum(images), limits.max_images), (len(lengths), most_samples))
    return max(-(-amount // per_sequence) for amount, per_sequence in needs if amount)


def _balanced(
    sizes: list[int], images: list[int], limits: PackingLimits, order: list[int], num_sequences: int
) -> list[list[int]] | None:
    """Pack into exactly ``num_sequences``, all about equally full; None where the heuristic finds no such packing.

    Every sequence gets a fixed number of samples, the mean rounded down or up. The longest sample left goes to the
    sequence whose open slots would have to be filled with the longest samples on average. So a sequence of 17 samples
    gets longer ones than a sequence of 18, and a narrow range of lengths fills both, which best-fit decreasing misses.
    """
    samples, longer = divmod(len(order), num_sequences)
    if samples == 0:
        return None
    open_slots = [samples + (sequence < longer) for sequence in range(num_sequences)]
    free_tokens, free_images = [limits.sequence_length] * num_sequences, [limits.max_images] * num_sequences
    packed: list[list[int]] = [[] for _ in range(num_sequences)]
    # minus the mean length to fill, sequence; IEEE division: equal on every machine
    waiting = [(-free_tokens[sequence] / open_slots[sequence], sequence) for sequence in range(num_sequences)]
    heapify(waiting)
    no_images: list[tuple[float, int]] = []  # sequences whose images are used up wait here for samples without one
    for index in order:
        count = images[index]
        heap = no_images if count == 0 and no_images and (not waiting or no_images[0] < waiting[0]) else waiting
        if not heap:
            return None
        _, sequence = heappop(heap)
        free_tokens[sequence] -= sizes[index]
        free_images[sequence] -= count
        open_slots[sequence] -= 1
        if free_tokens[sequence] < 0 or free_images[sequence] < 0:
            return None
        packed[sequence].append(index)
        if open_slots[sequence]:
            entry = (-free_tokens[sequence] / open_slots[sequence], sequence)
            heappush(waiting if free_images[sequence] else no_images, entry)
    return packed


def _best_fit(sizes: list[int], images: list[int], limits: PackingLimits, order: list[int]) -> list[list[int]]:
    """Best-fit decreasing: put each sample, the longest first, into the sequence it fills best, else into a new one."""
    packed: list[list[int]] = []
    free_images: list[int] = []
    # (free tokens, sequence), ascending; sequences whose images are used up are kept apart, so that samples with an
    # image skip them
    with_images: list[tuple[int, int]] = []
    without: list[tuple[int, int]] = []
    for index in order:
        size, count = sizes[index], images[index]
        candidates, at = with_images, bisect_left(with_images, (size, -1))
        while at < len(candidates) and free_images[candidates[at][1]] < count:
            at += 1
        if count == 0:
            other = bisect_left(without, (size, -1))
            if other < len(without) and (at == len(candidates) or without[other][0] <= candidates[at][0]):
                candidates, at = without, other
        if at < len(candidates):
            free_tokens, sequence = candidates.pop(at)
        else:
            free_tokens, sequence = limits.sequence_length, len(packed)
            packed.append([])
            free_images.append(limits.max_images)
        packed[sequence].append(index)
        free_images[sequence] -= count
        if free_tokens > size:
            insort(with_images if free_images[sequence] else without, (free_tokens - size, sequence))
    return packed


@dataclass(frozen=True, order=True)
class PackingState:
    """The whole state of a packed run: the next sequence is number ``sequence`` of ``block``."""

    block: int = 0
    sequence: int = 0

    def __post_init__(self) -> None:
        if self.block < 0 or self.sequence < 0:
            raise ValueError(f"{self}: blocks and sequences are counted from 0.")


class PackedSampler:
    """The packed sequences of a run, without end: block b holds the samples b*K ... b*K + K - 1, in a seeded order.

    length       (positions, images) of sample n, a pure function; 0 positions leave the sample out. A block is measured
                 as a whole, K calls, when its first sequence is asked for; the last few blocks are kept.
    buffer_size  K
    seed         shuffles the sequences of a block: packing leaves them sorted by length, which would bias training
    """

    def __init__(
        self,
        length: Callable[[int], tuple[int, int]],
        limits: PackingLimits,
        *,
        buffer_size: int = DEFAULT_BUFFER_SIZE,
        seed: int,
    ) -> None:
        if buffer_size < 1:
            raise ValueError(f"A block of {buffer_size} samples cannot be packed; it needs 1 or more.")
        self.limits = limits
        self.buffer_size = buffer_size
        self._length = length
        self._seed = seed
        self._blocks: OrderedDict[int, list[tuple[int, ...]]] = OrderedDict()

    def sequences(self, block: int) -> list[tuple[int, ...]]:
        """Return the sequences of a block as sample numbers, ascending in each sequence; do not change the list.

        Raises ValueError for a sample that fits in no sequence.
        """
        if block in self._blocks:
            self._blocks.move_to_end(block)
            return self._blocks[block]
        first = block * self.buffer_size
        numbers, lengths, images = [], [], []
        for number in range(first, first + self.buffer_size):
            length, count = self._length(number)
            if length:
                numbers.append(number)
                lengths.append(length)
                images.append(count)
        try:
            packed = pack(lengths, images, self.limits)
        except ValueError as error:
            raise ValueError(f"Samples {first} to {first + self.buffer_size - 1}: {error}") from error
        shuffled: list[tuple[int, ...]] = [()] * len(packed)
        seed = derive_seed("rows", self._seed, block)  # changing the string changes the order of every packed run
        for index, sequence in enumerate(packed):
            shuffled[feistel_permute(index, len(packed), seed)] = tuple(numbers[sample] for sample in sequence)
        self._blocks[block] = shuffled
        while len(self._blocks) > _MAX_CACHED_BLOCKS:
            self._blocks.popitem(last=False)
        return shuffled

    def iterate(self, state: PackingState = PackingState()) -> Iterator[tuple[PackingState, tuple[int, ...]]]:  # noqa: B008 (frozen)
        """Yield all sequences from ``state`` on, without end: (the state after it, the sequence's sample numbers).

        Raises DataError for a state beyond the end of its block, and where whole blocks hold no sample at all.
        """
        block, start, empty = state.block, state.sequence, 0
        held = len(self.sequences(block))
        if start > held:
            raise DataError(
                f"The packing state says sequence {start} of block {block}, but that block has {held} sequences: data, "
                "seed or packing limits differ from the run that wrote the state. Use the same ones, or start the data "
                "anew."
            )
        while empty < MAX_EMPTY_BLOCKS:
            sequences = self.sequences(block)
            for index in range(start, len(sequences)):
                last = index + 1 == len(sequences)
                yield PackingState(block + 1, 0) if last else PackingState(block, index + 1), sequences[index]
            empty = 0 if sequences else empty + 1
            block, start = block + 1, 0
        raise DataError(
            f"Blocks {block - empty} to {block - 1} ({empty * self.buffer_size} samples) hold no sample that can be "
            "trained on; the first bad samples counted say why."
        )
