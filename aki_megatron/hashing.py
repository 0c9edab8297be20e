"""splitmix64, the one hash function of the project: the same numbers on every machine and in every process.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants as in
java.util.SplittableRandom.
"""

import numpy as np
from numpy.typing import NDArray

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""Increment of the generator's state."""
MASK64 = (1 << 64) - 1

_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash every value: the next output of a splitmix64 generator in that state; a bijection of 64 bits.

    Output n (from 0) of the generator seeded with s is ``splitmix64(s + n * GOLDEN_GAMMA)`` modulo 2^64.
    """
    # array arithmetic wraps modulo 2^64 in silence; a 0-d result would warn
    z = np.asarray(values, dtype=np.uint64) + np.uint64(GOLDEN_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_SECOND)
    return z ^ (z >> np.uint64(31))


def splitmix64_int(value: int) -> int:
    """``splitmix64`` of one value in [0, 2^64): much faster than a numpy scalar, the same number."""
    value = (value + GOLDEN_GAMMA) & MASK64
    value = ((value ^ (value >> 30)) * _FIRST) & MASK64
    value = ((value ^ (value >> 27)) * _SECOND) & MASK64
    return value ^ (value >> 31)
