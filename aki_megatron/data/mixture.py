"""The source and the item of the n-th sample of a run: pure functions of (seed, n), computed by arithmetic alone.

The samples of a run are numbered 0, 1, 2, ... and fall into blocks. In every block each source is drawn a fixed number
of times, and a seeded permutation interleaves the draws, so the k-th draw of a source is known without counting. A
second seeded permutation maps draws to items: every item once per epoch, every epoch in another order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from aki_megatron.data.permutation import derive_seed, feistel_permute
from aki_megatron.errors import ConfigError

MIN_BLOCK_SIZE = 1000
MAX_BLOCK_SIZE = 100_000


@dataclass(frozen=True)
class SourceDraw:
    """Draw number ``draw_index`` (from 0) of source number ``source``."""

    source: int
    draw_index: int


class Mixture:
    """Weights of the sources: every block of ``block_size`` samples has ``counts_per_block[i]`` of source i, exactly.

    The block is the smallest one of 1,000 samples or more in which the normalized weights are whole numbers; where that
    would exceed 100,000 (weights like pi), the normalized weights are rounded to 1/100,000.
    Raises ConfigError for no source, and for a weight that is not positive or too small for one sample of a block.
    """

    def __init__(self, weights: Mapping[str, float], *, seed: int) -> None:
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

    def draw(self, n: int) -> SourceDraw:
        """Return the source of sample n, and how often that source is drawn before it."""
        block, offset = divmod(n, self.block_size)
        if len(self.names) > 1:
            offset = feistel_permute(offset, self.block_size, derive_seed("mixture", self.seed, block))
        source = 0
        while offset >= self.counts_per_block[source]:
            offset -= self.counts_per_block[source]
            source += 1
        return SourceDraw(source, block * self.counts_per_block[source] + offset)

    def item_index(self, source: int, draw_index: int, num_items: int) -> int:
        """Return which of ``num_items`` items a draw takes: each once per epoch, every epoch in another order."""
        epoch, offset = divmod(draw_index, num_items)
        # changing a string changes the order of samples of every run
        return feistel_permute(offset, num_items, derive_seed("element", self.seed, self.names[source], epoch))

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
