"""Users' own files are read lazily: offsets of lines and footers of tables in memory, few row groups, no open files."""

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from data_files import image_bytes
from own_files import llava, opened, picture_row, write_jsonl, write_parquet, write_pictures

from aki_megatron.data.shard_order import ShardOrder
from aki_megatron.data.sources.parquet_rows import RowGroupCache
from aki_megatron.errors import DataError


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_lines_stay_in_their_file(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    answer = "word " * 200  # a kilobyte a line
    write_jsonl(tmp_path / "chat.jsonl", [llava(f"Question {number}", answer) for number in range(4000)])
    before = num_open_files()
    tracemalloc.start()
    try:
        items = opened(tmp_path, "llava", "chat.jsonl").items
        at_rest, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "chat.jsonl").stat().st_size > 4_000_000
    assert at_rest < 400_000 and peak < 1_500_000
    for number in np.random.default_rng(1).permutation(4000)[:300]:
        assert items[int(number)].turns[0].prompt == f"Question {number}"
    assert num_open_files() == before


def test_a_line_that_changes_under_a_run_is_a_bad_sample(tmp_path: Path) -> None:
    write_pictures(tmp_path)
    path = write_jsonl(tmp_path / "chat.jsonl", [llava("A", "B"), llava("C", "D")])
    items = opened(tmp_path, "llava", "chat.jsonl").items
    path.write_text(path.read_text().replace("D", ""))
    assert items[0].turns
    with pytest.raises(DataError, match=r"chat\.jsonl, line 2 has changed while the run reads it: answer 1 is empty"):
        items[1]
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        items[0]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    write_pictures(tmp_path)
    for part in range(2):
        rows = [picture_row(100 * part + number) for number in range(60)]
        write_parquet(tmp_path / f"data/{part}.parquet", rows, row_group_size=10)
    return tmp_path


def test_row_groups_are_read_when_they_are_needed_and_kept(table: Path) -> None:
    before = num_open_files()
    source = opened(table, "parquet", "data")
    records = source.items._records.parts[0]
    cache = records._cache
    assert len(source.items) == 120 and source.counts.tolist() == [10] * 12 and cache.num_read == 0
    order = ShardOrder(source.counts, seed=1, name="mine", shards_per_block=4)
    drawn = [order.item_index(number) for number in range(120)]
    assert sorted(drawn) == list(range(120))
    for number in drawn:
        sample = source.items[number]
        value = number if number < 60 else number + 40
        assert sample.images == [image_bytes(value, form="PNG")] and sample.turns[0].response == f"It is {value}."
    assert cache.num_read == 12  # once each, as the order stays in a block
    assert num_open_files() == before


def test_the_cache_is_bounded_and_drops_what_was_used_least_recently(table: Path) -> None:
    source = opened(table, "parquet", "data")
    records = source.items._records.parts[0]
    source.items[0]
    one_group = records._cache.num_bytes
    cache = RowGroupCache(max_bytes=int(2.5 * one_group))
    records._cache = cache
    for number in (0, 10, 0, 20):  # group 1 is dropped
        source.items[number]
        assert cache.num_bytes <= 2.5 * one_group
    assert cache.num_read == 3
    source.items[0]
    assert cache.num_read == 3
    source.items[10]
    assert cache.num_read == 4
    records._cache = RowGroupCache(max_bytes=1)
    source.items[0], source.items[1]
    assert records._cache.num_read == 1  # one is always kept


def test_the_text_of_a_row_is_read_without_its_images(table: Path) -> None:
    source = opened(table, "parquet", "data")
    cache = source.items._records.parts[0]._cache
    texts = [source.read_text(number) for number in range(10)]
    text_bytes = cache.num_bytes
    assert all(text.images == [b""] for text in texts)
    whole = [source.items[number] for number in range(10)]
    assert cache.num_bytes - text_bytes > 1.3 * text_bytes
    assert [(text.key, text.turns, len(text.media)) for text in texts] == [
        (one.key, one.turns, len(one.media)) for one in whole
    ]
    again = source.read_text(0)  # from the whole row group, which is there
    assert cache.num_read == 2 and again.turns == whole[0].turns


def test_a_row_group_with_an_image_without_bytes_is_read_whole(tmp_path: Path) -> None:
    """Its path decides whether the record is good, so the text must not be read without it."""
    write_pictures(tmp_path)
    rows = [picture_row(number) for number in range(4)]
    rows[1]["images"] = [{"bytes": None, "path": "1.png"}]
    rows[2]["images"] = [{"bytes": None, "path": "https://x.invalid/2.png"}]
    write_parquet(tmp_path / "a.parquet", rows)
    source = opened(tmp_path, "parquet", "a.parquet")
    assert source.read_text(1).images == source.items[1].images == [tmp_path / "pics/1.png"]
    for read in (source.read_text, source.items.__getitem__):
        with pytest.raises(DataError, match="is not on this machine"):
            read(2)
