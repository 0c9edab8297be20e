"""Tars that a command writes: fetched whole or not at all, once per machine, within a limit."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from data_files import image_bytes, pairs, write_tar

from aki_megatron.data.shard_cache import ShardCache, command_name
from aki_megatron.data.shards import CaptionDataset, expand_shards, missing_shards
from aki_megatron.data.tar_index import index_path, read_header, write_index
from aki_megatron.errors import DataError


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """Four tars of three samples in a folder that is only read by commands."""
    for shard in range(4):
        write_tar(tmp_path / f"remote/{shard}.tar", pairs(3, first=3 * shard))
    return tmp_path / "remote"


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(tmp_path / "cache", retry_delay_seconds=0.0)


def logged(remote: Path, log: Path) -> str:
    """A command that writes a line to ``log`` and then the tar."""
    return f"echo 1 >> {log}; cat {remote}/0.tar"


def test_samples_of_fetched_tars(remote: Path, cache: ShardCache) -> None:
    dataset = CaptionDataset([f"pipe:cat {remote}/{{0..3}}.tar"], Path("elsewhere"), cache=cache)
    assert len(dataset) == 12 and dataset.counts.tolist() == [3] * 4
    for number in (11, 0, 5):
        caption = dataset.caption(number)
        assert caption.key == f"{remote}/{number // 3}/{number:06}"
        assert (caption.text, caption.image) == (f"The red cat {number}.\n", image_bytes(number))
    assert sorted(path.name for path in remote.iterdir()) == ["0.tar", "1.tar", "2.tar", "3.tar"]
    for tar in remote.iterdir():
        tar.unlink()  # all is local now, in this run and in the next
    again = CaptionDataset([f"pipe:cat {remote}/{{0..3}}.tar"], Path("elsewhere"), cache=ShardCache(cache.folder))
    assert [again.caption(number).text for number in range(12)] == [f"The red cat {n}.\n" for n in range(12)]


def test_with_a_published_index_the_tar_is_not_fetched_to_count_it(remote: Path, cache: ShardCache) -> None:
    for tar in list(remote.glob("*.tar")):
        write_index(tar)
    dataset = CaptionDataset([f"pipe:cat {remote}/{{0..3}}.tar"], Path(), cache=cache)
    assert len(dataset) == 12 and not list(cache.folder.glob("tars/*"))
    assert dataset.caption(4).text == "The red cat 4.\n"
    assert len(list(cache.folder.glob("tars/*.tar"))) == 1


def test_a_failing_command_is_named_with_its_exit_code_and_error_output(tmp_path: Path, cache: ShardCache) -> None:
    log = tmp_path / "log"
    command = f"echo 1 >> {log}; echo half; echo no such bucket >&2; exit 7"
    with pytest.raises(DataError, match=r"exit 7 failed with exit code 7: no such bucket Tried 3 times"):
        cache.fetch(command)
    assert not list((cache.folder / "tars").iterdir())  # the part that was written is gone
    with pytest.raises(DataError, match="exit code 7"):
        cache.fetch(command)
    assert log.read_text() == "1\n" * 3  # the second call reports without running it
    with pytest.raises(DataError, match=r"(?s)1 of 1 tars could not be indexed:.*exit code 7"):
        CaptionDataset([f"pipe:{command}"], Path(), cache=cache)


def test_a_command_that_fails_once_is_tried_again(remote: Path, tmp_path: Path, cache: ShardCache) -> None:
    flag = tmp_path / "flag"
    command = f"test -e {flag} || {{ touch {flag}; exit 1; }}; cat {remote}/0.tar"
    assert cache.fetch(command).read_bytes() == (remote / "0.tar").read_bytes()


def test_a_truncated_file_is_never_accepted(remote: Path, cache: ShardCache) -> None:
    half = f"head -c 3000 {remote}/0.tar"  # succeeds, as many tools do when the connection is lost
    with pytest.raises(DataError, match=r"(?s)wrote is not a whole tar: .*cut off"):
        CaptionDataset([f"pipe:{half}"], Path(), cache=cache)
    assert not list((cache.folder / "tars").iterdir())
    size = (remote / "0.tar").stat().st_size
    with pytest.raises(DataError, match=rf"wrote 3000 bytes, its index says {size}"):
        cache.fetch(half, size)
    with pytest.raises(DataError, match="succeeded but wrote nothing"):
        cache.fetch("true")


def test_a_tar_replaced_at_its_source_is_an_error_of_its_samples(remote: Path, cache: ShardCache) -> None:
    dataset = CaptionDataset([f"pipe:cat {remote}/{{0..1}}.tar"], Path(), cache=cache)
    cache.discard(f"cat {remote}/0.tar")
    write_tar(remote / "0.tar", pairs(90))
    with pytest.raises(DataError, match=r"If it was replaced, delete its index below .*indices"):
        dataset.caption(0)
    assert dataset.caption(3).text == "The red cat 3.\n"


def test_the_cache_evicts_the_least_recently_used_tars(remote: Path, tmp_path: Path) -> None:
    size = (remote / "0.tar").stat().st_size
    cache = ShardCache(tmp_path / "cache", 2 * size)
    commands = [f"cat {remote}/{number}.tar" for number in range(4)]
    for command in (commands[0], commands[1], commands[0], commands[2]):
        cache.fetch(command, size)
        time.sleep(0.01)  # clocks of file systems are coarse
    assert [cache.tar_path(command).exists() for command in commands] == [True, False, True, False]
    tiny = ShardCache(tmp_path / "tiny", 1)
    assert tiny.fetch(commands[3]).exists()  # one tar is always kept, or nothing could be read
    dataset = CaptionDataset([f"pipe:cat {remote}/{{0..3}}.tar"], Path(), cache=cache)
    for _ in range(2):
        dataset.close()
        assert [dataset.caption(number).text for number in range(12)] == [f"The red cat {n}.\n" for n in range(12)]
    assert len(list(cache.folder.glob("tars/*"))) <= 2


def test_leftovers_of_killed_processes_are_removed(remote: Path, cache: ShardCache) -> None:
    old, new = cache.folder / "tars/0.partial", cache.folder / "tars/1.partial"
    old.parent.mkdir(parents=True)
    old.touch()
    new.touch()
    os.utime(old, (1, 1))
    cache.fetch(f"cat {remote}/0.tar")
    assert not old.exists() and new.exists()


def test_many_readers_fetch_a_tar_once(remote: Path, tmp_path: Path, cache: ShardCache) -> None:
    log = tmp_path / "log"
    command = f"sleep 0.2; {logged(remote, log)}"
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: ShardCache(cache.folder).fetch(command), range(4)))
    assert len(paths) == 1 and log.read_text() == "1\n"
    code = (
        "import sys; from pathlib import Path; from aki_megatron.data.shard_cache import ShardCache;"
        "print(ShardCache(Path(sys.argv[1])).fetch(sys.argv[2]))"
    )
    other = f"sleep 0.5; {logged(remote, log)}; true"
    arguments = [sys.executable, "-c", code, str(cache.folder), other]
    started = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = {process.communicate(timeout=120)[0].strip() for process in started}
    assert printed == {str(cache.tar_path(other))} and log.read_text() == "1\n1\n"


def test_a_command_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", max_attempts=1, timeout_seconds=0.3)
    with pytest.raises(DataError, match="did not finish in 0.3 seconds and was stopped"):
        cache.fetch(f"(sleep 1; touch {tmp_path}/survived) ; true")
    time.sleep(1.2)
    assert not (tmp_path / "survived").exists()


def test_names_of_commands() -> None:
    assert command_name("aws s3 cp s3://bucket/kale/00012.tar -") == "s3://bucket/kale/00012"
    assert command_name("cat '/data/a b.tar'") == "b"
    assert command_name("curl -s https://me:pa55word@host/00012.tar") == "https://host/00012"
    assert command_name("cat a.tar b.tar").startswith("pipe-") and command_name("fetch 12").startswith("pipe-")
    assert command_name("fetch 12") != command_name("fetch 13")


def test_commands_are_not_run_to_see_what_is_missing(tmp_path: Path) -> None:
    patterns = [f"pipe:touch {tmp_path}/ran; cat {{0..2}}.tar", "x.tar"]
    assert missing_shards(patterns, tmp_path) == [str(tmp_path / "x.tar")]
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="is no file; a run that reads it fetches"):
        expand_shards(patterns, tmp_path)
    with pytest.raises(DataError, match="has no command after pipe:"):
        CaptionDataset(["pipe: "], tmp_path)


def test_a_failed_search_for_an_index_leaves_nothing(remote: Path, cache: ShardCache) -> None:
    target = cache.indices / "x.index"
    for command in (f"cat {remote}/0.tar", f"cat {remote}/0.tar {remote}/1.tar", "true x.tar"):
        assert not cache.fetch_index(command, target)
    assert list(cache.indices.iterdir()) == []
    write_index(remote / "0.tar")
    assert cache.fetch_index(f"cat {remote}/0.tar", target)
    assert read_header(target) == read_header(index_path(remote / "0.tar"))


@pytest.fixture
def server(remote: Path) -> Iterator[str]:
    """Serve the tars over HTTP on this machine."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(remote))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


def test_urls_are_opened_by_webdataset(server: str, remote: Path, cache: ShardCache) -> None:
    dataset = CaptionDataset([f"{server}/1.tar"], Path("elsewhere"), cache=cache)
    assert len(dataset) == 3 and dataset.caption(1).key == f"{server}/1/000004"
    assert [dataset.caption(n).text for n in range(3)] == [f"The red cat {n}.\n" for n in range(3, 6)]


def test_a_url_that_cannot_be_opened_is_named(server: str, cache: ShardCache) -> None:
    cache.max_attempts = 1
    for url, reason in ((f"{server}/no.tar", "exit 22"), ("s3://bucket/0.tar", "no gopen handler defined")):
        with pytest.raises(DataError, match=f"(?s)^{url} failed with exit code 1: .*{reason}"):
            cache.fetch(url)
