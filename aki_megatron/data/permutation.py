"""Seeds and permutations computed by arithmetic: pure functions, the same on every machine and in every process."""

from hashlib import blake2b

from aki_megatron.hashing import splitmix64_int

FEISTEL_ROUNDS = 6


def derive_seed(*parts: int | str) -> int:
    """Return a 64-bit seed for the given numbers and strings; a leading string separates the uses of one seed."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def feistel_permute(index: int, size: int, seed: int) -> int:
    """Return the image of ``index`` under a seeded permutation of 0 ... size-1, in constant time and memory.

    A Feistel network over the next even power of two; a value outside the range is permuted again until it is inside
    (cycle walking: at most 4 steps on average, 16 for sizes below 16).
    """
    assert 0 <= index < size, (index, size)
    half_bits = max(2, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for number in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (splitmix64_int(seed ^ (right << 8) ^ number) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index
