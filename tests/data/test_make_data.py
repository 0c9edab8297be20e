"""tools/make_data.py: tars from a folder or a table, indices, and error messages."""

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from data_files import image_bytes

from aki_megatron.config.data import CaptionsConfig
from aki_megatron.config.load import load_run
from aki_megatron.data.shard_writer import pairs_from_folder, write_shards
from aki_megatron.data.shards import CaptionDataset, expand_shards
from aki_megatron.data.tar_index import TarIndex, index_path, read_header

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "make_data.py"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the tool in this process; returns exit code, output and error output."""
    sys.path.insert(0, str(TOOL.parent))
    try:
        import make_data
    finally:
        sys.path.pop(0)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = make_data.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images, JPEG and PNG, one in a subfolder, with captions."""
    root = tmp_path / "images"
    for number in range(7):
        form, suffix = ("PNG", "png") if number == 3 else ("JPEG", "jpg")
        image = root / (f"deep/{number}.JPEG" if number == 5 else f"{number}.{suffix}")
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(image_bytes(number, form=form))
        image.with_suffix(".txt").write_text(f"Image {number}, \u00e9t\u00e9.\n", encoding="utf-8")
    return root


def samples(out: Path, pattern: str) -> list[tuple[str, str, bytes]]:
    return [(caption.key, caption.text, caption.image) for caption in CaptionDataset([pattern], out)]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix == ".tar"}


def test_a_folder_becomes_tars_that_are_read_back(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, printed, _ = run("shards", "--out", out, "--folder", folder, "--per-shard", 3, "--workers", 2)
    assert code == 0 and 'shards: ["{00000..00002}.tar"]' in printed and f"root: {out}" in printed
    assert "7 samples in 3 tars" in printed and "0 left out" in printed
    found = samples(out, "{00000..00002}.tar")
    order = [0, 1, 2, 3, 4, 6, 5]  # by name: deep/ comes last
    assert [key for key, _, _ in found] == [f"{at // 3:05}/{at:09}" for at in range(7)]
    assert [text for _, text, _ in found] == [f"Image {number}, \u00e9t\u00e9.\n" for number in order]
    assert [image for _, _, image in found] == [
        image_bytes(number, form="PNG" if number == 3 else "JPEG") for number in order
    ]
    tars = [out / f"0000{number}.tar" for number in range(3)]
    assert sorted(out.glob("*.tar*")) == sorted([*tars, *map(index_path, tars)])
    assert [read_header(index_path(tar)).num_samples for tar in tars] == [3, 3, 1]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    code, printed, _ = run("index", out / "{00000..00002}.tar")
    assert code == 0 and "0 tars indexed (0 samples), 3 were up to date." in printed
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_the_same_records_give_the_same_bytes_whatever_the_number_of_workers(
    run: Run, folder: Path, tmp_path: Path
) -> None:
    for workers in (1, 3):
        out = tmp_path / str(workers)
        assert run("shards", "--out", out, "--folder", folder, "--per-shard", 4, "--workers", workers)[0] == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_one_tar_has_a_plain_name(run: Run, folder: Path, tmp_path: Path) -> None:
    assert 'shards: ["00000.tar"]' in run("shards", "--out", tmp_path / "out", "--folder", folder)[1]


def test_images_of_every_suffix_are_packed_under_the_suffix_of_their_content(run: Run, tmp_path: Path) -> None:
    forms = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "jp2": "JPEG2000"}
    for number, (suffix, form) in enumerate(forms.items()):
        path = tmp_path / f"images/{number}.{suffix if number % 2 else 'jpg'}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image_bytes(number, form=form))
        path.with_suffix(".txt").write_text(form)
    code, printed, _ = run("shards", "--out", tmp_path / "out", "--folder", tmp_path / "images")
    assert code == 0 and "7 samples in 1 tars" in printed and "0 left out" in printed
    index = TarIndex(index_path(tmp_path / "out/00000.tar"))
    assert [index.sample(number).image_suffix for number in range(7)] == list(forms)
    assert [text for _, text, _ in samples(tmp_path / "out", "00000.tar")] == list(forms.values())


def test_nothing_is_overwritten_without_overwrite(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("shards", "--out", out, "--folder", folder, "--per-shard", 2)[0] == 0
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    code, _, error = run("shards", "--out", out, "--folder", folder)
    assert code == 2 and "holds 4 tars already" in error and "--overwrite" in error
    assert contents(out) == before
    assert run("shards", "--out", out, "--folder", folder, "--overwrite")[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "00000.tar.index", "notes.txt"]
    assert len(samples(out, "00000.tar")) == 7


def test_unusable_images_are_named_counted_and_left_out(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "1.jpg").write_bytes(image_bytes(1)[:300])
    (folder / "2.txt").unlink()
    (folder / "4.txt").write_text(" \n")
    (folder / "6.jpg").write_bytes(image_bytes(6, form="PPM"))
    (folder / "7.txt").write_text("an image that was lost")
    (folder / "8.tga").write_bytes(bytes(50))
    (folder / "8.txt").write_text("an image of another format")
    (folder / "0.json").write_text("{}")
    code, printed, _ = run("shards", "--out", tmp_path / "out", "--folder", folder)
    assert code == 0 and "3 samples in 1 tars" in printed and "6 left out" in printed
    output = " ".join(printed.split())
    for part in (
        "left out: 1.jpg: ",
        "left out: 2.jpg: its caption 2.txt cannot be read",
        "4.jpg: the caption is empty",
        "left out: 7.txt: there is no image of its name; read are jpg",
        "left out: 8.tga: its suffix is that of no image; read are jpg",
    ):
        assert part in output
    assert "6.jpg: its format has no suffix in a tar; convert it to JPEG or PNG" in output
    assert [text[:7] for _, text, _ in samples(tmp_path / "out", "00000.tar")] == [
        "Image 0",
        "Image 3",
        "Image 5",
    ]


def test_too_many_unusable_images_stop_and_leave_nothing(run: Run, folder: Path, tmp_path: Path) -> None:
    for number in range(20, 30):
        (folder / f"{number}.jpg").write_bytes(b"no image")
        (folder / f"{number}.txt").write_text("x")
    out = tmp_path / "out"
    code, _, error = run("shards", "--out", out, "--folder", folder)
    assert code == 2 and "9 of the first" in error and "(of 17) cannot be used, 8 may" in error and "20.jpg" in error
    assert list(out.iterdir()) == []
    code, _, error = run("shards", "--out", out, "--folder", folder, "--max-bad-fraction", 0)
    assert code == 2 and "0 may" in error and list(out.iterdir()) == []
    code, printed, _ = run("shards", "--out", out, "--folder", folder, "--max-bad-fraction", 0.9)
    assert code == 0 and "10 left out" in printed


def test_an_interrupted_packing_leaves_the_old_tars(folder: Path, tmp_path: Path) -> None:
    options = {"per_shard": 2, "max_bad_fraction": 0.0, "num_workers": 1}
    write_shards(pairs_from_folder(folder), tmp_path, overwrite=False, progress=lambda done, trouble: None, **options)
    before = contents(tmp_path)

    def interrupt(done: int, trouble: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(pairs_from_folder(folder), tmp_path, overwrite=True, progress=interrupt, **options)
    assert contents(tmp_path) == before and not (tmp_path / ".partial").exists()


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("file", "text")) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_a_csv_of_paths_becomes_tars(run: Run, folder: Path, tmp_path: Path) -> None:
    rows = [("3.png", 'three,\n"quoted"'), ("deep/5.JPEG", "five"), ("../secret.jpg", "out"), ("gone.jpg", "gone")]
    (tmp_path / "secret.jpg").write_bytes(image_bytes(9))
    table = write_csv(folder / "list.csv", rows)
    out, columns = tmp_path / "out", ("--image-column", "file", "--caption-column", "text")
    code, printed, _ = run("shards", "--out", out, "--table", table, *columns)
    assert code == 0 and "2 samples" in printed and "2 left out" in printed
    output = " ".join(printed.split())
    assert "list.csv row 3: the path '../secret.jpg' leads out of" in output and "list.csv row 4:" in output
    assert [text for _, text, _ in samples(out, "00000.tar")] == ['three,\n"quoted"', "five"]
    moved = write_csv(tmp_path / "list.csv", rows[:2])
    code, printed, _ = run("shards", "--out", tmp_path / "two", "--table", moved, *columns, "--image-root", folder)
    assert code == 0 and contents(tmp_path / "two") == contents(out)


def test_a_quotation_mark_that_is_never_closed_is_refused(run: Run, folder: Path) -> None:
    (folder / "list.csv").write_text('image,caption\n0.jpg,a\n1.jpg,"b\n2.jpg,c\n')
    code, _, error = run("shards", "--out", folder / "out", "--table", folder / "list.csv")
    assert code == 2 and "list.csv is not a valid CSV file: unexpected end of data (up to line 4)" in error


def test_rows_without_image_or_text_are_left_out_by_their_number(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "list.csv").write_text("\ufeffimage,caption\n0.jpg,a\n,b\n1.jpg\n2.jpg,\n", encoding="utf-8")
    code, printed, _ = run("shards", "--out", tmp_path / "out", "--table", folder / "list.csv")
    output = " ".join(printed.split())
    assert code == 0 and "1 samples in 1 tars" in output and "row 2: there is no image in this row" in output
    assert "row 3: the caption is no text but NoneType" in output and "row 4: the caption is empty" in output


def test_unknown_commands_and_wildcards_are_named(run: Run, tmp_path: Path) -> None:
    code, _, error = run("chekc", "--config", "x.yaml")
    assert code == 2 and "There is no command 'chekc'; the commands are tones, shards, index, check" in error
    code, _, error = run("index", tmp_path / "*.tar")
    assert code == 2 and "Wildcards are not expanded here; write {00000..00007}.tar" in error


def test_wrong_tables_are_refused_in_words(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = write_csv(tmp_path / "list.csv", [("https://images.example/1.jpg", "one")], ("image", "caption"))
    cases = {
        ("--table", table): "Images are not downloaded here",
        ("--table", table, "--caption-column", "alt"): "has no column ['alt']; there are ['image', 'caption']",
        ("--table", tmp_path / "none.csv"): "does not exist",
        ("--table", folder / "0.txt"): "must end in .parquet, .pq or .csv",
        ("--folder", tmp_path / "none"): "is no folder",
        ("--folder", folder, "--per-shard", 0): "must be at least 1",
        ("--folder", folder, "--max-bad-fraction", 2): "must lie between 0 and 1",
    }
    for arguments, message in cases.items():
        code, _, error = run("shards", "--out", out, *arguments)
        assert code == 2 and message in error, error
    assert "cannot be written" in run("shards", "--out", folder / "0.txt", "--folder", folder)[2]
    (tmp_path / "empty").mkdir()
    assert "holds no image" in run("shards", "--out", out, "--folder", tmp_path / "empty")[2]
    assert not out.exists() or list(out.iterdir()) == []


def test_a_parquet_of_bytes_structs_or_paths_becomes_the_same_tars(run: Run, folder: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    names = ["0.jpg", "3.png", "deep/5.JPEG"]
    data = [(folder / name).read_bytes() for name in names]
    forms = {
        "paths": pyarrow.array(names),
        "bytes": pyarrow.array(data),
        "structs": pyarrow.array([{"bytes": one, "path": None} for one in data]),
    }
    for form, column in forms.items():
        table = pyarrow.table({"image": column, "caption": pyarrow.array(["a", "b", "c"]), "other": [1, 2, 3]})
        parquet.write_table(table, folder / f"{form}.parquet")
        code, printed, _ = run("shards", "--out", tmp_path / form, "--table", folder / f"{form}.parquet")
        assert code == 0 and "3 samples" in printed
    assert contents(tmp_path / "paths") == contents(tmp_path / "bytes") == contents(tmp_path / "structs")
    assert [text for _, text, _ in samples(tmp_path / "bytes", "00000.tar")] == ["a", "b", "c"]
    code, _, error = run(
        "shards", "--out", tmp_path / "x", "--table", folder / "bytes.parquet", "--image-column", "jpg"
    )
    assert code == 2 and "has no column ['jpg']" in error
    (folder / "torn.parquet").write_bytes((folder / "bytes.parquet").read_bytes()[:200])
    code, _, error = run("shards", "--out", tmp_path / "x", "--table", folder / "torn.parquet")
    assert code == 2 and "is not a readable parquet file" in error


def test_index_writes_what_is_missing_or_stale(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("shards", "--out", out, "--folder", folder, "--per-shard", 3)
    whole = {number: index_path(out / f"0000{number}.tar").read_bytes() for number in range(3)}
    index_path(out / "00000.tar").unlink()
    index_path(out / "00001.tar").write_bytes(whole[1][:50])
    code, printed, _ = run("index", out / "{00000..00002}.tar", "--workers", 2)
    assert code == 0 and "2 tars indexed (6 samples), 1 were up to date." in printed
    assert {number: index_path(out / f"0000{number}.tar").read_bytes() for number in range(3)} == whole
    (out / "00002.tar").write_bytes((out / "00001.tar").read_bytes())
    assert "1 tars indexed (3 samples), 2 were up to date." in run("index", out / "{00000..00002}.tar")[1]
    code, _, error = run("index", out / "{00002..00004}.tar")
    assert code == 2 and "00003.tar" in error and "00004.tar" in error
    assert run("index", out / "00000.tar", "--workers", 0)[0] == 2


def test_the_call_without_a_command_draws_as_ever(run: Run, tmp_path: Path) -> None:
    words = ("--out", tmp_path / "data", "--train_scenes", "10", "--val_scenes", "5")
    code, printed, _ = run(*words)
    assert code == 0 and "train/captions" in printed and "train/llava" in printed
    assert "complete, nothing to do" in run(*words)[1]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("shards --out", "index '", "--train_scenes", "13 public datasets")),
        (("shards",), ("BLIP3-OCR-200M", "--caption-column", "byte for byte")),
        (("index",), ("brace patterns", "--workers")),
    ],
)
def test_help_teaches(
    run: Run, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*words, "--help")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(part in printed for part in parts)


def load_printed(printed: str, tmp_path: Path) -> CaptionsConfig:
    """Return the caption set of a run whose configuration is the demo's and what the tool printed."""
    snippet = printed.partition("For the run's configuration:\n\n")[2]
    path = tmp_path / "run.yaml"
    path.write_text(f"base: {ROOT / 'configs/demo/pretrain.yaml'}\n{snippet}")
    config = load_run([], default_config=path, prog="", description="")
    assert config.data.kind == "captions" and len(config.data.captions) == 1
    tars = expand_shards(config.data.captions[0].shards, config.data.root)
    assert tars and all(tar.is_file() for tar in tars)
    return config.data.captions[0]


@pytest.mark.parametrize("name", ["out", "with space: and # sign", "007"])
def test_the_printed_configuration_is_accepted(run: Run, folder: Path, tmp_path: Path, name: str) -> None:
    code, printed, _ = run("shards", "--out", tmp_path / name, "--folder", folder, "--per-shard", 3)
    assert code == 0
    captions = load_printed(printed, tmp_path)
    assert captions.name == name and captions.format == "caption"


def test_the_printed_configuration_names_the_format_of_blip3_ocr(run: Run, folder: Path, tmp_path: Path) -> None:
    for text in folder.rglob("*.txt"):
        text.write_text('[{"text": "The image contains the text \\"A\\"", "granularity": 0}]')
    code, printed, _ = run("shards", "--out", tmp_path / "out", "--folder", folder)
    assert code == 0 and load_printed(printed, tmp_path).format == "blip3_ocr"


def test_no_image_of_a_folder_is_left_out_in_silence(run: Run, folder: Path, tmp_path: Path) -> None:
    for suffix, form in ((".webp", "WEBP"), (".heic", None)):
        (folder / f"extra{suffix}").write_bytes(image_bytes(1, form=form) if form else b"ftypheic")
        (folder / f"extra{suffix}").with_suffix(".txt").write_text("extra")
    code, printed, _ = run("shards", "--out", tmp_path / "out", "--folder", folder)
    packed = len(samples(tmp_path / "out", "00000.tar"))
    left_out = printed.count("left out: ")
    assert code == 0 and packed == 8 and left_out == 1 and "left out: extra.heic" in printed


def test_a_byte_order_mark_of_a_text_file_is_not_packed(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "0.txt").write_text("marked", encoding="utf-8-sig")
    run("shards", "--out", tmp_path / "out", "--folder", folder)
    assert "marked" in [text for _, text, _ in samples(tmp_path / "out", "00000.tar")]
