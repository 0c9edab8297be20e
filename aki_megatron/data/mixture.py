"""Which source and which element the n-th sample of a run is: pure functions of (seed, n), by arithmetic alone.

The samples of a run are numbered 0, 1, 2, ... Numbers fall into blocks; in every block each source gets its
share of places exactly, and a keyed permutation scatters them. So the k-th visit to a source is known without
counting, and a second keyed permutation turns visits into elements: everything once, then everything again in
another order.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from hashlib import blake2b
from math import lcm

from aki_megatron.errors import ConfigError

SMALLEST_BLOCK = 1000
LARGEST_BLOCK = 100_000
ROUNDS = 6

_WORD = (1 << 64) - 1


def keyed(*parts: int | str) -> int:
    """A 64-bit key from numbers and strings, the same on every machine and in every process."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(value: int) -> int:
    """Scatter 64 bits over 64 bits (the finalizer of splitmix64; a bijection)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def permute(index: int, size: int, key: int) -> int:
    """Where ``index`` of 0 ... size-1 goes: a bijection for every key, in constant time and memory.

    A Feistel network over the next even power of two; a value outside the range walks on until it is inside
    (at most 4 steps on average, 16 for sizes below 16).
    """
    assert 0 <= index < size, (index, size)
    half = max(2, ((size - 1).bit_length() + 1) // 2)
    low_bits = (1 << half) - 1
    while True:
        left, right = index >> half, index & low_bits
        for number in range(ROUNDS):
            left, right = right, left ^ (mix(key ^ (right << 8) ^ number) & low_bits)
        index = (left << half) | right
        if index < size:
            return index


@dataclass(frozen=True)
class Draw:
    """One draw of the mixture: the ``visit``-th visit (from 0) to source number ``source``."""

    source: int
    visit: int


class Mixture:
    """Shares of the sources. In every block of ``block`` numbers source i is drawn ``places[i]`` times exactly.

    The block is the smallest one of 1,000 samples or more in which the normalized weights are whole numbers;
    where that would exceed 100,000 (weights like pi), the shares are rounded to 1/100,000.
    Raises ConfigError for a weight that is not positive or too small to get a place.
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
        shares = [share / sum(exact) for share in exact]
        self.places = _places(shares)
        self.block = sum(self.places)
        if 0 in self.places:
            name = self.names[self.places.index(0)]
            raise ConfigError(
                f"The weight {weights[name]} of {name} is below 1/{LARGEST_BLOCK} of the mixture; raise it."
            )

    def draw(self, n: int) -> Draw:
        """Which source sample n of the run comes from, and how often that source was visited before n's place."""
        block, inside = divmod(n, self.block)
        place = permute(inside, self.block, keyed("mixture", self.seed, block)) if len(self.names) > 1 else inside
        source = 0
        while place >= self.places[source]:
            place -= self.places[source]
            source += 1
        return Draw(source, block * self.places[source] + place)

    def element(self, source: int, visit: int, size: int) -> int:
        """Which of ``size`` elements a visit meets: each once per pass, every pass in another order."""
        round_trip, index = divmod(visit, size)
        return permute(index, size, keyed("element", self.seed, self.names[source], round_trip))

    def substitute(self, n: int, attempt: int, size: int) -> int:
        """The element that stands in for a bad one of sample n, at the given attempt (1, 2, ...)."""
        return keyed("substitute", self.seed, n, attempt) % size


def _places(shares: list[Fraction]) -> list[int]:
    """Whole places per block for shares that sum to 1."""
    block = lcm(*(share.denominator for share in shares))
    if block <= LARGEST_BLOCK:
        block *= -(-SMALLEST_BLOCK // block)
        return [int(share * block) for share in shares]
    places = [int(share * LARGEST_BLOCK) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: places[i] - shares[i] * LARGEST_BLOCK)
    for source in by_remainder[: LARGEST_BLOCK - sum(places)]:
        places[source] += 1
    return places
