"""The index file: what it holds, when it matches its tar, and headers parsed as tarfile parses them."""

import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from data_files import pairs, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st

from aki_megatron.data.tar_index import TarIndex, index_matches, index_path, read_header, write_index
from aki_megatron.data.tar_members import ByteRange, iter_members
from aki_megatron.data.tar_scan import scan_tar
from aki_megatron.errors import DataError


def indexed(tar: Path) -> bool:
    header, found = read_header(index_path(tar)), tar.stat()
    return header is not None and index_matches(header, tar, found.st_size, found.st_mtime_ns)


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


def test_an_index_holds_every_sample(tmp_path: Path) -> None:
    members = [*pairs(5), ("broken.txt", b"x"), ("x.json", b"{}"), ("x.PNG", b"png"), ("x.txt", b"text")]
    tar = write_tar(tmp_path / "00000.tar", members)
    assert write_index(tar) == 7
    assert index_path(tar).name == "00000.tar.index" and indexed(tar)
    header = read_header(index_path(tar))
    assert header is not None and (header.num_samples, header.num_readable) == (7, 6)
    index, data = TarIndex(index_path(tar)), tar.read_bytes()
    assert [index.sample(number) for number in range(7)] == list(scan_tar(tar))
    last = index.sample(6)
    assert (last.key, last.image_suffix, last.error) == ("x", "png", "")
    parts = (last.text, last.image, last.json)
    assert [data[part.offset : part.offset + part.size] for part in parts] == [b"text", b"png", b"{}"]
    assert (
        index.sample(5).error
        == "no image member (found: txt; an image ends in jpg, png, jpeg, webp, gif, bmp, tif, tiff, avif, jp2)."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.tar", "00000.tar.index"]


def test_a_copy_keeps_its_index_and_another_tar_does_not(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(8))
    write_index(tar)
    os.utime(tar, ns=(1, 1))  # as cp without -p leaves it
    assert indexed(tar)
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert indexed(tmp_path / "copy/a.tar")
    content = bytearray(tar.read_bytes())
    write_tar(tar, pairs(8, first=8))
    assert len(tar.read_bytes()) == len(content) and not indexed(tar)  # of equal size, with other samples
    tar.write_bytes(content + bytes(512))
    assert not indexed(tar)


@pytest.mark.parametrize("damage", [b"", b"AKITARIX", b"x" * 200])
def test_a_damaged_index_is_none(tmp_path: Path, damage: bytes) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(2))
    write_index(tar)
    good = index_path(tar).read_bytes()
    for bad in (damage, good[:-1], good + b"x", good[:8] + b"\xff" + good[9:]):
        index_path(tar).write_bytes(bad)
        assert read_header(index_path(tar)) is None
        with pytest.raises(DataError, match=r"a\.tar\.index is missing, malformed or cut off"):
            TarIndex(index_path(tar))


def test_an_index_that_is_cut_off_while_open(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(3))
    write_index(tar)
    index = TarIndex(index_path(tar))
    os.truncate(index_path(tar), 150)
    with pytest.raises(DataError, match="cut off"):
        index.sample(2)


def test_unwritable_and_unreadable_paths_are_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/a\.index cannot be written"):
        write_index(tar, tmp_path / "file/a.index")
    with pytest.raises(DataError, match=r"Tar .*b\.tar cannot be read"):
        write_index(tmp_path / "b.tar")


def test_require_complete_refuses_a_tar_that_is_cut_off(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(2))
    tar.write_bytes(tar.read_bytes()[:3400])
    with pytest.raises(DataError, match=r"a\.tar, key 000001: the tar is cut off inside 000001\.jpg"):
        write_index(tar, require_complete=True)
    assert write_index(tar) == 2


def test_names_that_lead_out_of_the_tar_are_errors(tmp_path: Path) -> None:
    members = [
        (f"{key}.{suffix}", b"x") for key in ("../up", "/etc/x", "a/../../b", "a/.../c") for suffix in ("jpg", "txt")
    ]
    samples = list(scan_tar(write_tar(tmp_path / "a.tar", members)))
    assert [sample.key for sample in samples] == ["../up", "/etc/x", "a/../../b", "a/.../c"]
    assert [sample.error.startswith("the name leads out of the tar") for sample in samples] == [True, True, True, False]


def test_names_in_other_encodings_are_escaped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        add(tar, "\u00e9.jpg", b"i")
        add(tar, "\u00e9.txt", b"t")
    write_index(tmp_path / "a.tar")
    assert TarIndex(tmp_path / "a.tar.index").sample(0).key == "\\xe9"


def test_members_of_no_sample_are_skipped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "README", b"x")
        add(tar, "__meta__.json__", b"x")
        add(tar, "a.d/", b"", type=tarfile.DIRTYPE)
        add(tar, "a.d/1.jpg", b"i")
        add(tar, "a.d/.DS_Store", b"x")
        add(tar, "a.d/1.link", b"", type=tarfile.SYMTYPE, linkname="../../etc/passwd")
        add(tar, "a.d/1.txt", b"t")
    (sample,) = scan_tar(tmp_path / "a.tar")
    assert (sample.key, sample.error, sample.image_suffix) == ("a.d/1", "", "jpg")


def test_a_member_too_large_for_memory_is_an_error(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.size = 2**33 + 5  # beyond the octal field: GNU writes it in binary
    small = tarfile.TarInfo("a.txt")
    small.size = 1
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.seek(2**33 + 512, os.SEEK_CUR)
        file.write(small.tobuf(tarfile.GNU_FORMAT) + b"x" + bytes(511) + bytes(1024))
    (sample,) = scan_tar(tmp_path / "a.tar")
    assert sample.error == f"a member of {2**33 + 5} bytes; {2**28} at most."


NAMES = st.text(st.sampled_from("ab/\u00e9\u4e2d"), min_size=1, max_size=180).map(lambda name: name.strip("/") or "a")


@given(
    members=st.lists(st.tuples(NAMES, st.sampled_from(["jpg", "txt", "json"]), st.binary(max_size=1500)), max_size=8),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    time=st.sampled_from([0, 1e9 + 0.25, 2**34]),
)
@settings(max_examples=80, deadline=None)
def test_headers_are_parsed_as_tarfile_parses_them(tmp_path_factory, members, form: int, time: float) -> None:
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    with tarfile.open(path, "w", format=form) as tar:
        for number, (name, suffix, data) in enumerate(members):
            try:
                add(tar, f"{name}/{number}.{suffix}", data, mtime=time)
            except ValueError:  # ustar refuses names and times that do not fit
                continue
    with tarfile.open(path) as tar:
        expected = [(m.name, ByteRange(m.offset_data, m.size), "") for m in tar.getmembers()]
    with path.open("rb") as file:
        found = list(iter_members(file.fileno(), path.stat().st_size))
        assert [member[:3] for member in found] == expected and not any(m.damage or m.lost for m in found)
    assert [sample.key for sample in scan_tar(path)] == [name.rpartition(".")[0] for name, _, _ in expected]


@given(offset=st.integers(0, 10_239), value=st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_damage_never_hides_samples_silently(tmp_path_factory, offset: int, value: int) -> None:
    """A byte changed in any header or in the end mark is an error: the samples after it are not lost silently."""
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    data = bytearray(write_tar(path, [(f"{n}.{s}", b"x" * 300) for n in range(4) for s in ("jpg", "txt")]).read_bytes())
    assert len(data) == 10_240
    before = list(scan_tar(path))
    data[offset] ^= value
    path.write_bytes(data)
    after = list(scan_tar(path))
    in_content = offset < 8192 and offset % 1024 >= 512
    assert after == before or (not in_content and any(sample.error for sample in after))


def test_zeros_in_the_middle_are_no_end(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", pairs(6))
    data = bytearray(tar.read_bytes())
    data[3072:5120] = bytes(2048)
    tar.write_bytes(data)
    samples = list(scan_tar(tar))
    (damage,) = [sample for sample in samples if sample.damaged]
    assert "more members follow: zeros in its middle" in damage.error
    lost = samples[samples.index(damage) + 1 :]
    assert lost and all("behind the point where the tar is damaged" in sample.error for sample in lost)
