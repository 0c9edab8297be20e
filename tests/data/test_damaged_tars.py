"""Tars as they come: every kind of damage is named with what the file is and counted by samples; nothing is mixed up.

webdataset's own reader sees the same samples in the same tars: keys, bytes and order.
"""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import IMAGE_DECODERS, image_bytes, pairs, write_tar
from tar_readers import read_samples, read_with_webdataset

from aki_megatron.data.mixture import Mixture
from aki_megatron.data.sample_stream import MixtureStream, Source
from aki_megatron.data.shards import CaptionDataset
from aki_megatron.data.tar_scan import IMAGE_SUFFIXES
from aki_megatron.errors import DataError
from tools.make_data import main as make_data


def index_command(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = make_data(["index", "--workers", "1", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def whole(folder: Path, count: int = 20) -> bytes:
    return write_tar(folder / "whole.tar", pairs(count)).read_bytes()


def cut_off(path: Path) -> None:
    path.write_bytes(whole(path.parent)[: 7 * 2560 + 2050])


def cut_between_members(path: Path) -> None:
    path.write_bytes(whole(path.parent)[: 7 * 2560])


def joined(path: Path) -> None:
    path.write_bytes(whole(path.parent, 7) + write_tar(path.with_suffix(".2"), pairs(13, first=7)).read_bytes())


def joined_off_the_grid(path: Path) -> None:
    path.write_bytes(whole(path.parent)[: 7 * 2560 + 1111] + whole(path.parent)[7 * 2560 :])


def damaged_header(path: Path) -> None:
    data = bytearray(whole(path.parent))
    data[7 * 2560 + 10] ^= 1
    path.write_bytes(data)


def zeros_inside(path: Path) -> None:
    data = bytearray(whole(path.parent))
    data[7 * 2560 : 8 * 2560] = bytes(2560)
    path.write_bytes(data)


def hard_links(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (name, data) in enumerate(pairs(20)):
            member = tarfile.TarInfo(name)
            if name.endswith(".jpg") and number >= 14:
                member.type, member.linkname = tarfile.LNKTYPE, "000000.jpg"
                data = b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def by_suffix(path: Path) -> None:
    """The members of seven samples together, those of thirteen apart: all images, then all texts."""
    members = pairs(20)
    write_tar(path, [*members[:14], *sorted(members[14:], key=lambda member: member[0][-3:])])


def by_suffix_with_json(path: Path) -> None:
    members = pairs(20)
    others = members[14:] + [(f"{number:06}.json", b"{}") for number in range(7, 20)]
    write_tar(path, [*members[:14], *sorted(others, key=lambda member: member[0][-3:])])


def devices(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (name, data) in enumerate(pairs(20)):
            member = tarfile.TarInfo(name)
            if name.endswith(".txt") and number >= 14:
                member.type = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)[number % 3]
                data = b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def soft_links(path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (name, data) in enumerate(pairs(20)):
            member = tarfile.TarInfo(name)
            if name.endswith(".txt") and number >= 14:
                member.type, member.linkname = tarfile.SYMTYPE, "000000.txt"
                data = b""
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def garbage_before(path: Path) -> None:
    path.write_bytes(b"HTTP/1.1 200 OK\r\n\r\n" + whole(path.parent))


def gnu_sparse(path: Path, form: str = "gnu") -> None:
    folder = path.with_suffix(".files")
    folder.mkdir()
    for name, data in pairs(20):
        (folder / name).write_bytes(data)
    for number in range(7, 20):
        with (folder / f"{number:06}.jpg").open("r+b") as file:  # more holes than one header holds
            for hole in range(1, 7):
                file.seek(hole * 98304)
                file.write(b"x" * 4096)
    names = sorted(file.name for file in folder.iterdir())
    subprocess.run(["tar", "--sparse", f"--format={form}", "-cf", path, "-C", folder, *names], check=True)


def pax_sparse(path: Path) -> None:
    gnu_sparse(path, "pax")


def dots(path: Path) -> None:
    members = pairs(20)
    write_tar(path, members[:14] + [(f"2023.{name}", data) for name, data in members[14:]])


def repeated(path: Path) -> None:
    """Two samples of one key in a row, seven times, one of them with its members in another order, after six."""
    members = pairs(20)
    doubled = [("twice." + name.partition(".")[2], data) for name, data in members[14:28]]
    write_tar(path, members[:14] + [*doubled[:2], *doubled[2:4], *members[28:], *members[28:38:2], *members[29:39:2]])


DAMAGES: list[tuple[Callable[[Path], None], str, int, str]] = [
    (cut_off, "cut off inside 000007.txt", 8, ""),
    (cut_between_members, "the tar has no end mark; it was cut off after this key", 8, ""),
    (joined, "tars joined by cat; join them with tar --concatenate", 20, "behind the point where the tar is damaged"),
    (joined_off_the_grid, "no valid header at byte", 20, "behind the point where the tar is damaged"),
    (damaged_header, "no valid header at byte 17920", 20, "behind the point where the tar is damaged"),
    (zeros_inside, "zeros in its middle", 19, "behind the point where the tar is damaged"),
    (hard_links, "13 samples, the first 000007: its jpg is a link to another member", 20, "--hard-dereference"),
    (gnu_sparse, "13 samples, the first 000007: its jpg is stored as a sparse file", 20, "without tar --sparse"),
    (pax_sparse, "13 samples, the first 000007: its jpg is stored as a sparse file", 20, "without tar --sparse"),
    (soft_links, "13 samples, the first 000007: its txt is a link to another member", 20, "--hard-dereference"),
    (devices, "13 samples, the first 000007: its txt is a device, a pipe or a folder, not a file", 20, ""),
    (by_suffix, "13 samples, the first 000007: its image and its text are apart in the tar", 20, "--sort=name"),
    (by_suffix_with_json, "13 samples, the first 000007: its image and its text are apart", 20, "--sort=name"),
    (dots, "13 samples, the first 2023.000007: the name has a dot before its suffix", 20, "2023_0.jpg"),
]


@pytest.mark.parametrize(("damage", "reason", "total", "also"), DAMAGES, ids=[row[0].__name__ for row in DAMAGES])
def test_every_damaged_tar_is_named_and_counted_by_samples(
    damage: Callable[[Path], None], reason: str, total: int, also: str, tmp_path: Path, capsys
) -> None:
    tar = tmp_path / "00000.tar"
    damage(tar)
    code, printed = index_command(tar, capsys=capsys)
    (line,) = [line for line in printed.splitlines() if line.startswith(str(tar))]
    assert code == 1 and reason in line and also in line
    assert f": 7 of {'at least ' if total is None else ''}" in line.replace("at least 21", "21").replace(
        "at least 20", "20"
    )
    lines: list[str] = []
    dataset = CaptionDataset(["00000.tar"], tmp_path, progress=lines.append)
    assert lines[-2].startswith("1 of the 1 tars of") and lines[-1].strip() == line
    samples, errors = read_samples(tar)
    assert len(samples) == 7 and len(samples) + len(errors) == len(dataset) == total
    assert all(f"Tar {tar}, key " in error for error in errors)
    if damage not in (gnu_sparse, pax_sparse):  # webdataset fills the holes with zeros; here they are refused
        assert samples == read_with_webdataset(tar)
    assert index_command(tar, capsys=capsys)[0] == 1  # also where the index is up to date


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"<!DOCTYPE html><html><body>404</body></html>", r"HTML \(an error page\?\)"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', r"XML \(an error page\?\)"),
        (gzip.compress(b"x" * 5000, mtime=0), "gzip"),
        (b"PK\x03\x04" + bytes(600), "a zip archive"),
        (lzma.compress(b"x" * 5000), "xz"),
        (lzma.compress(b"x" * 5000, format=lzma.FORMAT_ALONE), "lzma"),
        (bz2.compress(b"x" * 5000), "bzip2"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstandard"),
        (b"\x04\x22\x4d\x18" + bytes(600), "lz4"),
        (b"\x1f\x9d\x90" + bytes(600), r"compress \(.Z\)"),
        (b"ARROW1\0\0" + bytes(600), "Arrow"),
        (b"<Error><Code>NoSuchKey</Code></Error>", r"XML \(an error page\?\)"),
        (b"PAR1" + bytes(600), "parquet"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"\xff\xd8\xff" + bytes(600), "a JPEG image"),
        (b'{"message": "Not Found"}', "text that begins"),
        (bytes(range(1, 256)) * 4, "of no known format"),
    ],
)
def test_a_file_that_is_no_tar_is_named_by_what_it_is(content: bytes, kind: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(DataError, match=rf"No readable sample .*\n.*00000.tar: no .* is no tar but {kind}") as raised:
        CaptionDataset(["00000.tar"], tmp_path)
    assert "key" not in str(raised.value)
    write_tar(tmp_path / "00001.tar", pairs(3))
    lines: list[str] = []
    dataset = CaptionDataset(["{00000..00001}.tar"], tmp_path, progress=lines.append)
    assert "no sample readable" in lines[-1] and dataset.counts.tolist() == [1, 3]
    assert index_command(tmp_path / "{00000..00001}.tar", capsys=capsys)[0] == 1


def test_a_tar_inside_of_another_archive_is_named_by_what_holds_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "00000.tar", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("00000.tar", whole(tmp_path))
    assert len(read_samples(tmp_path / "00000.tar")[0]) == 0
    with pytest.raises(DataError, match="is no tar but a zip archive"):
        CaptionDataset(["00000.tar"], tmp_path)


def test_a_damaged_first_header_whose_name_begins_like_a_format_is_that_of_a_tar(tmp_path: Path) -> None:
    members = [("BM." + name.partition(".")[2], data) for name, data in pairs(1)]
    data = bytearray(write_tar(tmp_path / "00000.tar", [*members, *pairs(3)]).read_bytes())
    data[110] ^= 1
    (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(DataError, match="malformed at its beginning: no valid header at byte 0"):
        CaptionDataset(["00000.tar"], tmp_path)


def test_a_tar_with_bytes_before_it_is_named(tmp_path: Path) -> None:
    garbage_before(tmp_path / "00000.tar")
    with pytest.raises(DataError, match="0 of at least 20 samples readable. the tar is malformed at its beginning: no"):
        CaptionDataset(["00000.tar"], tmp_path)


def test_suffixes_in_any_case_and_a_folder_with_dots_are_read(tmp_path: Path) -> None:
    members = [("v1.2/A.JPG", image_bytes(1)), ("v1.2/A.TXT", b"a"), ("B.Jpeg", image_bytes(2)), ("B.Txt", b"b")]
    members += [("./c.PNG", image_bytes(3)), ("./c.txt", b"c"), ("._c.jpg", b"x"), ("c/", b"")]
    samples, errors = read_samples(write_tar(tmp_path / "a.tar", members))
    assert not errors and samples == read_with_webdataset(tmp_path / "a.tar")
    assert [key for key, _, _ in samples] == ["v1.2/A", "B", "./c"]


def test_the_same_key_in_two_tars_is_two_samples(tmp_path: Path) -> None:
    for shard, shade in ((0, 9), (1, 200)):
        write_tar(tmp_path / f"0000{shard}.tar", [("0.jpg", image_bytes(shade)), ("0.txt", b"%d" % shade)])
    first, second = CaptionDataset(["{00000..00001}.tar"], tmp_path)
    assert (first.key, first.text, first.image) == ("00000/0", "9", image_bytes(9))
    assert (second.key, second.text, second.image) == ("00001/0", "200", image_bytes(200))


def test_a_tar_without_samples_is_named(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "00000.tar", [])
    write_tar(tmp_path / "00001.tar", pairs(3))
    code, printed = index_command(tmp_path / "{00000..00001}.tar", capsys=capsys)
    assert code == 1 and "00000.tar: no sample in it." in printed and "00001.tar" not in printed


def test_whole_tars_are_not_named(tmp_path: Path, capsys) -> None:
    write_tar(tmp_path / "00000.tar", pairs(3))
    lines: list[str] = []
    CaptionDataset(["00000.tar"], tmp_path, progress=lines.append)
    assert not any("unreadable" in line for line in lines)
    code, printed = index_command(tmp_path / "00000.tar", capsys=capsys)
    assert code == 0 and "unreadable" not in printed


@pytest.mark.parametrize("known_by", ["img2dataset", "other tars", "nothing"])
def test_samples_that_a_cut_tar_lost_count_one_by_one(known_by: str, tmp_path: Path) -> None:
    cut_off(tmp_path / "00000.tar")
    for shard in range(1, 4) if known_by == "other tars" else ():
        write_tar(tmp_path / f"{shard:05}.tar", pairs(20, first=20 * shard))
    if known_by == "img2dataset":
        (tmp_path / "00000_stats.json").write_text(json.dumps({"count": 25, "successes": 20}))
    pattern = "{00000..00003}.tar" if known_by == "other tars" else "00000.tar"
    lines: list[str] = []
    dataset = CaptionDataset([pattern], tmp_path, progress=lines.append)
    known = known_by != "nothing"
    assert dataset.counts[0] == (20 if known else 8)
    assert ("7 of 20 samples readable" if known else "7 of at least 8 samples readable") in lines[-1]
    assert not known or "About 12 of the samples are not in the file at all" in lines[-1]
    with pytest.raises(
        DataError, match=r"00000\.tar: sample number 19 was lost where the tar is cut off" if known else ""
    ):
        dataset.caption(19 if known else 7)
    whole_fingerprint = dataset.fingerprint
    assert whole_fingerprint == CaptionDataset([pattern], tmp_path).fingerprint


def test_equal_keys_in_a_row_are_refused_whatever_the_order(tmp_path: Path) -> None:
    red, blue = (("jpg", image_bytes(250)), ("txt", b"red")), (("jpg", image_bytes(5)), ("txt", b"blue"))
    for number, order in enumerate([(*red, *blue), (red[0], blue[0], red[1], blue[1]), (*red, blue[1], blue[0])]):
        members = [*pairs(1), *((f"1.{suffix}", data) for suffix, data in order), ("2.jpg", b"i"), ("2.txt", b"t")]
        samples, errors = read_samples(write_tar(tmp_path / f"{number}.tar", members))
        assert [key for key, _, _ in samples] == ["000000", "2"]
        assert len(errors) == 2 and all("key 1: this key occurs several times in a row" in error for error in errors)


def test_equal_keys_apart_keep_their_own_images(tmp_path: Path, make_template) -> None:
    red, blue = image_bytes(250), image_bytes(5)
    members = [("0.jpg", red), ("0.txt", b"red"), *pairs(1), ("0.jpg", blue), ("0.txt", b"blue")]
    tar = write_tar(tmp_path / "a.tar", members)
    samples, errors = read_samples(tar)
    assert samples == read_with_webdataset(tar) and not errors
    assert [sample for sample in samples if sample[0] == "0"] == [("0", "red", red), ("0", "blue", blue)]
    dataset = CaptionDataset(["a.tar"], tmp_path)
    stream = MixtureStream(
        {"c": Source(dataset)},
        Mixture({"c": 1.0}, seed=0),
        make_template().render_caption,
        decoders=IMAGE_DECODERS,
    )
    shown = {tuple(sample.token_ids): sample.images[0].rgb for n in range(9) if (sample := stream.sample(n).sample)}
    assert len(shown) == len(set(shown.values())) == 3  # each caption with an image of its own


def test_images_of_every_suffix_are_read(tmp_path: Path) -> None:
    members = []
    for suffix in IMAGE_SUFFIXES:
        members += [(f"{suffix}.{suffix}", image_bytes(len(members))), (f"{suffix}.txt", suffix.encode())]
    tar = write_tar(tmp_path / "a.tar", members)
    samples, errors = read_samples(tar)
    assert (
        [key for key, _, _ in samples] == list(IMAGE_SUFFIXES) and not errors and samples == read_with_webdataset(tar)
    )


def test_missing_tars_are_left_out_on_request_and_counted(tmp_path: Path, capsys) -> None:
    for shard in (0, 2, 5):
        write_tar(tmp_path / f"{shard:05}.tar", pairs(2, first=2 * shard))
    pattern, lines = "{00000..00005}.tar", list[str]()
    with pytest.raises(DataError, match=r"(?s)00001\.tar.*skip_missing: true"):
        CaptionDataset([pattern], tmp_path)
    dataset = CaptionDataset([pattern], tmp_path, skip_missing=True, progress=lines.append)
    assert len(dataset) == 6 and dataset.caption(2).key == "00002/000004"
    assert lines[0].startswith("3 of the 6 tars") and "00001.tar" in lines[0] and "skip_missing" in lines[0]
    (tmp_path / "00009.tar").mkdir()
    with pytest.raises(DataError, match=r"00009\.tar \(a folder\)"):
        CaptionDataset(["00009.tar"], tmp_path)
    with pytest.raises(DataError, match="None of the 2 tars"):
        CaptionDataset(["{00003..00004}.tar"], tmp_path, skip_missing=True)
    assert index_command(tmp_path / pattern, capsys=capsys)[0] == 2
    code, printed = index_command("--skip_missing", tmp_path / pattern, capsys=capsys)
    assert code == 0 and "3 of 6 tars do not exist and are left out" in printed


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_sees_the_same_samples_in_whole_tars(form: int, tmp_path: Path) -> None:
    names = ["a/b.c/7", "UPPER", "unterstrich_\u00e9", "lang" * 20, "with space", "x/" * 30 + "deep", "__a"]
    members = [("README", b"r"), ("__meta__.json__", b"m"), (".DS_Store", b"d"), ("a/.hidden.jpg", b"h")]
    members += [("__meta__/1.jpg", b"i"), ("__meta__/1.txt", b"t"), ("a/__m__.jpg", b"i"), ("a/__m__.txt", b"t")]
    for number, name in enumerate(names):
        members += [(f"{name}.JPG" if number % 2 else f"{name}.png", image_bytes(number)), (f"{name}.seg.png", b"s")]
        members += [(f"{name}.txt", name.encode()), (f"{name}.json", b"{}")]
    members += [("only.txt", b"t"), ("image.jpg", b"i"), *pairs(3)]
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    samples, errors = read_samples(tmp_path / "a.tar")
    assert samples == read_with_webdataset(tmp_path / "a.tar") and len(samples) == len(names) + 4 and len(errors) == 2


def test_a_copy_of_an_index_of_an_older_version_is_built_anew(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [("a.webp", b"i"), ("a.txt", b"t")])
    CaptionDataset(["a.tar"], tmp_path)
    index = tmp_path / "a.tar.index"
    data = bytearray(index.read_bytes())
    data[8] = 2
    index.write_bytes(data)
    (tmp_path / "tars.manifest").unlink()
    assert CaptionDataset(["a.tar"], tmp_path).caption(0).image == b"i" and tar.exists()
