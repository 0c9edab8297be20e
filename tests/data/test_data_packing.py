"""Packing: nothing lost, nothing over, equal every time, from any place; and how little of the rows is padding."""

import importlib.util
import json
import statistics
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aki_megatron.data.mixture import mix
from aki_megatron.data.packing import (
    BLOCK_SAMPLES,
    MOST_EMPTY_BLOCKS,
    Limits,
    PackedSampler,
    PackingState,
    fewest_rows,
    pack,
)
from aki_megatron.errors import DataError

NO_IMAGE_LIMIT = 1 << 20
DEMO_LENGTHS = {23: 0.35, 24: 0.52, 26: 0.03, 27: 0.05, 35: 0.05}
"""Lengths of the demo's fine-tuning samples and their shares: 9 places per image, a tokenizer of whole sentences."""


def bench() -> ModuleType:
    """tools/bench/packing.py, which has the made-up lengths."""
    path = Path(__file__).parents[2] / "tools" / "bench" / "packing.py"
    spec = importlib.util.spec_from_file_location("bench_packing", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@st.composite
def blocks(draw: st.DrawFn) -> tuple[list[int], list[int], Limits]:
    """Lengths and images of any kind: narrow, wide, equal, two sorts; with tight and loose image budgets."""
    row = draw(st.integers(1, 300))
    shortest = draw(st.integers(1, row))
    longest = draw(st.integers(shortest, row))
    lengths = draw(st.lists(st.integers(shortest, longest), max_size=80))
    max_images = draw(st.integers(0, 12))
    most = draw(st.integers(0, min(3, max_images)))
    images = draw(st.lists(st.integers(0, most), min_size=len(lengths), max_size=len(lengths)))
    return lengths, images, Limits(row, max_images)


@settings(max_examples=300, deadline=None)
@given(blocks())
def test_every_sample_once_and_no_budget_broken(block: tuple[list[int], list[int], Limits]) -> None:
    lengths, images, limits = block
    rows = pack(lengths, images, limits)
    assert sorted(position for row in rows for position in row) == list(range(len(lengths)))
    assert all(row and list(row) == sorted(row) for row in rows)
    assert all(sum(lengths[position] for position in row) <= limits.sequence_length for row in rows)
    assert all(sum(images[position] for position in row) <= limits.max_images for row in rows)
    assert pack(np.array(lengths, int), np.array(images, int), limits) == rows
    if lengths:
        assert fewest_rows(lengths, images, limits) <= len(rows) <= len(lengths)


@settings(max_examples=100, deadline=None)
@given(blocks())
def test_never_worse_than_best_fit_decreasing(block: tuple[list[int], list[int], Limits]) -> None:
    lengths, images, limits = block
    room: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        open_rows = [r for r in room if r[0] >= lengths[position] and r[1] >= images[position]]
        row = min(open_rows, default=None, key=lambda r: r[0])
        if row is None:
            room.append(row := [limits.sequence_length, limits.max_images])
        row[0] -= lengths[position]
        row[1] -= images[position]
    # with images the choice among equally full rows can cost the simple version a row, or this one
    spare = 0 if len(set(images)) <= 1 else 1
    assert len(pack(lengths, images, limits)) <= len(room) + spare


def test_known_packings() -> None:
    assert pack([], [], Limits(8, 1)) == []
    assert pack([8], [0], Limits(8, 0)) == [(0,)]
    assert {tuple(sorted((5, 3, 3, 5)[n] for n in row)) for row in pack([5, 3, 3, 5], [1] * 4, Limits(8, 2))} == {
        (3, 5)
    }
    assert len(pack([1] * 10, [1] * 10, Limits(100, 3))) == 4
    # best fit decreasing would put 4 with 3 and need a third row
    assert {
        tuple(sorted((4, 3, 3, 2, 2, 2)[n] for n in row)) for row in pack([4, 3, 3, 2, 2, 2], [0] * 6, Limits(8, 0))
    } == {(2, 2, 4), (2, 3, 3)}


@pytest.mark.parametrize(
    ("lengths", "images", "said"),
    [
        ([3, 9], [0, 0], r"Sample 1 of the block has 9 tokens and 0 images; a row takes 1 to 8 tokens"),
        ([3, 3], [0, 3], r"Sample 1 of the block has 3 tokens and 3 images; .* at most 2 images"),
        ([0], [0], r"Sample 0 of the block has 0 tokens"),
        ([1, 2], [0], r"2 lengths but 1 numbers of images"),
    ],
)
def test_a_sample_that_fits_in_no_row_is_an_error(lengths: list[int], images: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack(lengths, images, Limits(8, 2))


def test_limits_and_places_are_checked() -> None:
    for wrong in ({"sequence_length": 0, "max_images": 1}, {"sequence_length": 1, "max_images": -1}):
        with pytest.raises(ValueError, match="1 place or more"):
            Limits(**wrong)
    with pytest.raises(ValueError, match="counted from 0"):
        PackingState(0, -1)
    with pytest.raises(ValueError, match="0 samples"):
        order(buffer_size=0)


def measure(n: int) -> tuple[int, int]:
    """Lengths 20 ... 83 with an image in three of four; one sample in eleven is dropped."""
    value = mix(n)
    return (0, 0) if value % 11 == 0 else (20 + value % 64, int(value % 4 > 0))


def order(**changes) -> PackedSampler:
    return PackedSampler(measure, Limits(256, 5), **({"buffer_size": 100, "key": 7} | changes))


def test_a_block_holds_its_own_samples_and_leaves_dropped_ones_out() -> None:
    for block in (0, 3, 1_000_000_000):
        numbers = range(100 * block, 100 * block + 100)
        rows = order().rows(block)
        assert sorted(n for row in rows for n in row) == [n for n in numbers if measure(n)[0]]
        assert any(not measure(n)[0] for n in numbers)
        for row in rows:
            assert list(row) == sorted(row)
            assert sum(measure(n)[0] for n in row) <= 256 and sum(measure(n)[1] for n in row) <= 5


def test_rows_depend_on_the_key_and_on_nothing_else() -> None:
    first, again = order(), order()
    again.rows(5), again.rows(2)
    assert [first.rows(block) for block in range(6)] == [again.rows(block) for block in range(6)]
    other = order(key=8)
    assert first.rows(0) != other.rows(0) and sorted(first.rows(0)) == sorted(other.rows(0))


def test_the_last_blocks_are_kept_and_old_ones_are_let_go() -> None:
    asked: list[int] = []

    def counting(n: int) -> tuple[int, int]:
        asked.append(n)
        return measure(n)

    kept = PackedSampler(counting, Limits(256, 5), buffer_size=100, key=7)
    list(islice(kept.walk(), 3 * len(kept.rows(0))))
    assert len(asked) == len(set(asked)) and max(asked) < 500
    kept.rows(40), kept.rows(41), kept.rows(42), kept.rows(0)
    assert asked.count(0) == 2


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(1, 40), st.integers(0, 2**64 - 1))
def test_a_walk_from_any_place_is_the_tail_of_the_whole_walk(taken: int, buffer_size: int, key: int) -> None:
    whole = list(islice(order(buffer_size=buffer_size, key=key).walk(PackingState()), 80))
    place = whole[taken - 1][0] if taken else PackingState(0, 0)
    resumed = order(buffer_size=buffer_size, key=key).walk(place)
    assert list(islice(resumed, 80 - taken)) == whole[taken:]
    places = [place for place, _ in whole]
    assert places == sorted(set(places))


def test_the_place_after_a_block_is_the_start_of_the_next() -> None:
    held = len(order().rows(0))
    walked = list(islice(order().walk(), held + 1))
    assert walked[held - 1][0] == PackingState(1, 0) and walked[held][0] == PackingState(1, 1)
    assert next(order().walk(PackingState(0, held))) == walked[held]  # the same place, written otherwise


def test_a_place_of_another_packing_is_an_error() -> None:
    with pytest.raises(DataError, match=r"row 999 of block 2, but that block has \d+ rows"):
        next(order().walk(PackingState(2, 999)))


def test_blocks_without_samples_are_passed_over_and_end_a_run_that_has_no_others() -> None:
    sparse = PackedSampler(lambda n: (5, 0) if n == 57 else (0, 0), Limits(8, 0), buffer_size=10, key=1)
    walk = sparse.walk()
    assert next(walk) == (PackingState(6, 0), (57,))
    with pytest.raises(DataError, match=f"{MOST_EMPTY_BLOCKS * 10} samples.* hold no sample"):
        next(walk)


def test_an_oversized_sample_names_its_block() -> None:
    with pytest.raises(ValueError, match="Samples 20 to 29: Sample 3 of the block has 9 tokens"):
        PackedSampler(lambda n: (9 if n == 23 else 1, 0), Limits(8, 0), buffer_size=10, key=1).rows(2)


def correlation(values: Sequence[float]) -> float:
    return statistics.correlation(range(len(values)), values)


def test_the_order_of_rows_says_nothing_about_lengths() -> None:
    lengths, images = (column.tolist() for column in bench().finetune_lengths(4096))
    packed = pack(lengths, images, Limits(4096, 32))

    def longest(rows: list[tuple[int, ...]]) -> list[float]:
        return [statistics.mean(lengths[n] for n in row) for row in rows]

    assert abs(correlation(longest(packed))) > 0.5  # as packed it would be a curriculum
    shuffled = [
        PackedSampler(lambda n: (lengths[n], images[n]), Limits(4096, 32), buffer_size=4096, key=key).rows(0)
        for key in range(8)
    ]
    assert max(abs(correlation(longest(rows))) for rows in shuffled) < 4 / len(packed) ** 0.5


@pytest.mark.parametrize("sequence_length", [2048, 4096, 8192])
@pytest.mark.parametrize(("kind", "most_padding"), [("pretrain", 1.0), ("finetune", 2.0), ("demo", 6.5)])
def test_nearly_every_place_holds_a_token(kind: str, most_padding: float, sequence_length: int) -> None:
    samples = 2 * BLOCK_SAMPLES
    if kind == "demo":
        rng = np.random.default_rng(0)
        shares = np.array(list(DEMO_LENGTHS.values()))
        lengths = rng.choice(list(DEMO_LENGTHS), samples, p=shares / shares.sum()), np.ones(samples, int)
        most_padding = {2048: 1, 4096: 3, 8192: 6.5}[sequence_length]  # so short that a block is 12 rows of 8192
    else:
        lengths = getattr(bench(), f"{kind}_lengths")(samples)
    found = bench().measured(lengths, BLOCK_SAMPLES, Limits(sequence_length, NO_IMAGE_LIMIT))
    assert found["bound"] <= found["padding"] <= most_padding


def test_lengths_of_a_narrow_range_are_combined() -> None:
    narrow = bench().narrow_lengths(BLOCK_SAMPLES)
    assert bench().measured(narrow, BLOCK_SAMPLES, Limits(4096, 32))["padding"] < 1
    alike = np.full(BLOCK_SAMPLES, 230), np.ones(BLOCK_SAMPLES, int)
    assert 4.5 < bench().measured(alike, BLOCK_SAMPLES, Limits(4096, 32))["padding"] < 4.6  # 17 * 230 = 3910
    assert bench().measured(alike, BLOCK_SAMPLES, Limits(18 * 230, 32))["padding"] < 0.5


def test_a_tight_image_budget_costs_hardly_a_row_more_than_it_must() -> None:
    lengths, images = (column.tolist() for column in bench().finetune_lengths(BLOCK_SAMPLES))
    for max_images in (8, 14, 16, 17, 20):
        limits = Limits(4096, max_images)
        assert len(pack(lengths, images, limits)) <= 1.01 * fewest_rows(lengths, images, limits)


def test_packing_is_quick() -> None:
    tool = bench()
    for lengths in (tool.pretrain_lengths(4096), tool.finetune_lengths(4096)):
        size, images = (column.tolist() for column in lengths)
        spent = []
        for _ in range(5):
            start = time.process_time()
            pack(size, images, Limits(4096, 32))
            spent.append(time.process_time() - start)
        assert min(spent) < 0.040  # 8 to 10 milliseconds of processor time; slower machines are let pass


def test_the_tool_prints_and_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "packing.json"
    bench().main(["--sequence_length", "4096", "--blocks", "256", "--samples", "512", "--json", str(file)])
    rows = json.loads(file.read_text())
    assert [row["lengths"] for row in rows] == ["pretrain", "finetune", "narrow"]
    assert all(0 <= row["bound"] <= row["padding"] < 10 and row["block"] == 256 for row in rows)
    assert "padding %" in capsys.readouterr().out
