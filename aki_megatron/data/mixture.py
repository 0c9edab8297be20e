"""The source and the item of the n-th sample of a run: pure functions of (seed, n), computed by arithmetic alone.

The samples of a run are numbered 0, 1, 2, ... and fall into blocks. In every block each source is drawn a fixed number
of times, and a seeded permutation interleaves the draws, so the k-th draw of a source is known without counting. A
second seeded permutation maps draws to items: every item once per epoch, every epoch in another order.

A block takes its draws of a source in the permuted order, so the draws around the end of an epoch mix with the next
epoch's where both are in one block: an item may be drawn twice before another is drawn once. A source with fewer items
than draws per block would never be drawn evenly, so its draws are counted in the order of the samples.
"""

from array import array
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import lcm

from aki_megatron.data.permutation import derive_seed, feistel_permute
from aki_megatron.errors import ConfigError

MIN_BLOCK_SIZE = 1000
MAX_BLOCK_SIZE = 100_000

_MAX_CACHED_BLOCKS = 16
"""Packing takes samples from a few thousand numbers in any order, which are several of the smallest blocks."""


@dataclass(frozen=True)
class SourceDraw:
    """Draw number ``draw_index`` (from 0) of source number ``source``."""

    source: int
    draw_index: int


@dataclass(frozen=True)
class SourcePass:
    """The draws of a source that a phase takes: those that earlier phases left out, then all from ``next_draw`` on.

    seed  of the order of the source's items: the seed of the first phase that reads it
    """

    seed: int
    left: tuple[int, ...] = ()
    next_draw: int = 0

    def draw_index(self, number: int) -> int:
        """Return the draw that is this phase's number 0, 1, 2, ..."""
        return self.left[number] if number < len(self.left) else self.next_draw + number - len(self.left)

    def after(self, first: int, last: int, used: Collection[int]) -> "SourcePass":
        """Return what is left after the phase's draws 0 ... first-1 and, of first ... last-1, the ``used`` ones."""
        left = tuple(self.draw_index(number) for number in range(first, last) if number not in used)
        return replace(self, left=left + self.left[last:], next_draw=self.next_draw + max(0, last - len(self.left)))


class Mixture:
    """Weights of the sources: every block of ``block_size`` samples has ``counts_per_block[i]`` of source i, exactly.

    The block is the smallest one of 1,000 samples or more in which the normalized weights are whole numbers; where that
    would exceed 100,000 (weights like pi), the normalized weights are rounded to 1/100,000.

    passes     where the pass over a source begins that an earlier phase read; other sources begin anew
    num_items  items of each source, where known: draws of a source with fewer than its draws per block are counted in
               the order of the samples

    Raises ConfigError for no source, and for a weight that is not positive or too small for one sample of a block.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        seed: int,
        passes: Mapping[str, SourcePass] | None = None,
        num_items: Mapping[str, int] | None = None,
    ) -> None:
        if not weights:
            raise ConfigError("A mixture needs at least one source (data.sources).")
        bad = {name: weight for name, weight in weights.items() if not 0 < weight < float("inf")}
        if bad:
            raise ConfigError(f"Weights must be positive numbers, got {bad}.")
        self.names = tuple(weights)
        self.seed = seed
        exact = [Fraction(str(weight)) for weight in weights.values()]  # 0.103 is meant as 103/1000
        self.counts_per_block = _counts_per_block([weight / sum(exact) for weight in exact])
        self.block_size = sum(self.counts_per_block)
        if 0 in self.counts_per_block:
            name = self.names[self.counts_per_block.index(0)]
            raise ConfigError(
                f"The weight {weights[name]} of {name} is below 1/{MAX_BLOCK_SIZE} of the mixture; raise it."
            )
        self.passes = {name: (passes or {}).get(name, SourcePass(seed)) for name in self.names}
        pairs = zip(self.names, self.counts_per_block, strict=True)
        small = [len(weights) > 1 and (num_items or {}).get(name, count) < count for name, count in pairs]
        self._is_small = tuple(small)
        self._offsets: dict[int, array[int]] = {}
        """Of the last blocks asked for: for each sample, how often its source is drawn before it in the block."""

    def draw(self, n: int) -> SourceDraw:
        """Return the source of sample n, and which of its draws the sample takes."""
        source, number = self._draw_number(n)
        return SourceDraw(source, self.passes[self.names[source]].draw_index(number))

    def passes_after(self, num_samples: int) -> dict[str, SourcePass]:
        """Return where a later phase goes on with each source, after the first samples of this one."""
        block, rest = divmod(num_samples, self.block_size)
        used: list[set[int]] = [set() for _ in self.names]
        for n in range(num_samples - rest, num_samples):
            source, number = self._draw_number(n)
            used[source].add(number)
        return {
            name: self.passes[name].after(block * count, (block + (rest > 0)) * count, numbers)
            for name, count, numbers in zip(self.names, self.counts_per_block, used, strict=True)
        }

    def _draw_number(self, n: int) -> tuple[int, int]:
        """Return the source of sample n, and the number of its draw among those of this phase."""
        block, offset = divmod(n, self.block_size)
        source, within = self._draw_in_block(block, offset)
        if self._is_small[source]:
            within = self._counted_offset(block, offset)
        return source, block * self.counts_per_block[source] + within

    def _counted_offset(self, block: int, offset: int) -> int:
        """Return how often the source of a sample of a block is drawn before it in the block."""
        offsets = self._offsets.get(block)
        if offsets is None:
            drawn, offsets = [0] * len(self.names), array("I")
            for position in range(self.block_size):
                source, _ = self._draw_in_block(block, position)
                offsets.append(drawn[source])
                drawn[source] += 1
            kept = list(self._offsets.items())[1 - _MAX_CACHED_BLOCKS :]
            self._offsets = {**dict(kept), block: offsets}  # one assignment: other threads may be reading the old one
        return offsets[offset]

    def _draw_in_block(self, block: int, offset: int) -> tuple[int, int]:
        """Return the source of a sample of a block, and the number of its draw in the block, in permuted order."""
        if len(self.names) > 1:
            offset = feistel_permute(offset, self.block_size, derive_seed("mixture", self.seed, block))
        source = 0
        while offset >= self.counts_per_block[source]:
            offset -= self.counts_per_block[source]
            source += 1
        return source, offset

    def item_index(self, source: int, draw_index: int, num_items: int) -> int:
        """Return which of ``num_items`` items a draw takes: each once per epoch, every epoch in another order."""
        epoch, offset = divmod(draw_index, num_items)
        name = self.names[source]
        # changing a string changes the order of samples of every run
        return feistel_permute(offset, num_items, derive_seed("element", self.passes[name].seed, name, epoch))

    def replacement_index(self, n: int, attempt: int, num_items: int) -> int:
        """Return the item that replaces a bad one of sample n, at the given attempt (1, 2, ...)."""
        return derive_seed("substitute", self.seed, n, attempt) % num_items


def _counts_per_block(weights: list[Fraction]) -> tuple[int, ...]:
    """Return the samples per block of each source, for weights that sum to 1."""
    size = lcm(*(weight.denominator for weight in weights))
    if size <= MAX_BLOCK_SIZE:
        size *= -(-MIN_BLOCK_SIZE // size)
        return tuple(int(weight * size) for weight in weights)
    counts = [int(weight * MAX_BLOCK_SIZE) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - weights[i] * MAX_BLOCK_SIZE)
    for source in by_remainder[: MAX_BLOCK_SIZE - sum(counts)]:
        counts[source] += 1
    return tuple(counts)
