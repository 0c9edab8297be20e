"""A folder that looks like 10,000 indexed tars of 10,000 samples each, made in a second or two and taking 1 MB.

There is one tar, a hole without bytes, and one index; the others are hard links to them. So a start asks the size and
time of 10,000 files and reads 10,000 headers or one manifest, as it would of real ones, but every index is in the
page cache after the first is read. The samples themselves cannot be read (they are zeros).
"""

import os
from pathlib import Path

from aki_megatron.data.tar_index import index_path, tar_digest, write_entries
from aki_megatron.data.tar_scan import Entry, Extent

_HEADER, _TEXT, _IMAGE = 512, 512, 50_176  # bytes; 100 million of these are 5 TB


def make_up(folder: Path, *, shards: int = 10_000, samples: int = 10_000) -> str:
    """Fill an empty folder; returns the brace pattern of its tars, relative to the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    last = f"{shards - 1:05}"
    first = folder / f"{0:0{len(last)}}.tar"
    stride = 2 * _HEADER + _IMAGE + _TEXT
    with first.open("xb") as tar:
        tar.truncate(samples * stride + 2 * _HEADER)
        found = os.fstat(tar.fileno())
    handle = os.open(first, os.O_RDONLY)
    digest = tar_digest(handle, found.st_size)
    os.close(handle)
    entries = (
        Entry(
            f"{number:09}",
            text=Extent(number * stride + 2 * _HEADER + _IMAGE, _TEXT),
            image=Extent(number * stride + _HEADER, _IMAGE),
            suffix="jpg",
        )
        for number in range(samples)
    )
    write_entries(index_path(first), entries, tar_bytes=found.st_size, tar_time=found.st_mtime_ns, digest=digest)
    for number in range(1, shards):
        tar_path = folder / f"{number:0{len(last)}}.tar"
        os.link(first, tar_path)
        os.link(index_path(first), index_path(tar_path))
    return f"{{{first.stem}..{last}}}.tar"
