"""splitmix64 gives the recorded numbers, as an array and as an int."""

import numpy as np
import pytest

from aki_megatron.hashing import GOLDEN_GAMMA, MASK64, splitmix64, splitmix64_int

RECORDED = {
    0: 0xE220A8397B1DCDAF,
    1: 0x910A2DEC89025CC1,
    2: 0x975835DE1C9756CE,
    12345: 0x22118258A9D111A0,
    1 << 63: 0x481EC0A212A9F3DB,
    MASK64: 0xE4D971771B652C20,
}


def test_recorded_values() -> None:
    hashed = splitmix64(np.array(list(RECORDED), dtype=np.uint64))
    assert hashed.dtype == np.uint64
    assert hashed.tolist() == list(RECORDED.values())
    assert [splitmix64_int(value) for value in RECORDED] == list(RECORDED.values())


def test_published_outputs_of_the_generator() -> None:
    """The first outputs of splitmix64 seeded with 1234567 (the reference implementation's test vector)."""
    states = [(1234567 + n * GOLDEN_GAMMA) & MASK64 for n in range(5)]
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert [splitmix64_int(state) for state in states] == published


@pytest.mark.filterwarnings("error")
def test_array_and_int_agree_without_overflow_warnings() -> None:
    values = np.random.default_rng(0).integers(0, 1 << 64, size=1000, dtype=np.uint64)
    assert splitmix64(values).tolist() == [splitmix64_int(value) for value in values.tolist()]
