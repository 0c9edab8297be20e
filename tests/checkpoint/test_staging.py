"""The folder of a conversion: every --out that cannot be replaced is refused first; one process at a time; signals."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from convert_helpers import Run, refused
from tiny_folders import language_folder

from aki_megatron.checkpoint.staging import CONTENT, LOCK, staging_dir
from aki_megatron.errors import CheckpointError

TOOL = Path(__file__).parents[2] / "tools" / "convert.py"


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk" / "empty").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "disk" / "new" / "one")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, target in (("link", "empty"), ("dangling", "new/one")):
        with staging_dir(tmp_path / name) as folder:
            (folder / "a").write_text("whole")
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "disk" / target / "a").read_text() == "whole"
    with pytest.raises(CheckpointError, match="link exists and is not empty"), staging_dir(tmp_path / "link"):
        pass
    with pytest.raises(CheckpointError, match="loop is a link that leads nowhere"), staging_dir(tmp_path / "loop"):
        pass
    assert not list(tmp_path.rglob(".writing_*"))


def test_mount_points_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="/proc is a mount point.*--out /proc/NAME"), staging_dir(Path("/proc")):
        pytest.fail("worked")
    out = tmp_path / "out"
    out.mkdir()

    def busy(self: Path, _target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy", str(self))

    monkeypatch.setattr(Path, "replace", busy)  # what a bind mount of the same file system answers
    with pytest.raises(CheckpointError, match="out is a mount point"), staging_dir(out):
        pytest.fail("worked")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300, "full"])
def test_other_paths_are_refused_before_the_work(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be written|is not empty"), staging_dir(tmp_path / name):
        pytest.fail("worked")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full"]


def test_two_conversions_into_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staging_dir(out) as folder:
        (folder / "a").write_text("first")
        with (
            pytest.raises(CheckpointError, match=r"out is being written by another conversion \(process \d+ on"),
            staging_dir(out),
        ):
            pytest.fail("worked")
        assert (folder / "a").read_text() == "first"  # untouched
    assert (out / "a").read_text() == "first"
    with pytest.raises(CheckpointError, match="exists and is not empty"), staging_dir(out):
        pytest.fail("worked")


def test_what_appears_at_out_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="out was filled by something else"), staging_dir(out) as folder:
        (folder / "a").write_text("mine")
        out.mkdir()
        (out / "b").write_text("theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "b"]


def test_leftovers_are_removed_or_named(tmp_path: Path) -> None:
    killed, other, running = (tmp_path / f".writing_{name}" for name in ("out", "other", "running"))
    for folder in (killed, other, running):
        (folder / CONTENT).mkdir(parents=True)
        (folder / CONTENT / "half").write_text("half")
        (folder / LOCK).write_text("process 1 on a\n")
    (tmp_path / ".writing_step_000100").mkdir()  # of a run
    lines: list[str] = []
    with (running / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with staging_dir(tmp_path / "out", lines.append) as folder:
            (folder / "a").write_text("whole")
    assert lines == [
        f"removed {killed}, which a conversion that was killed left",
        f"{other} was left by a conversion that was killed; it can be removed",
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
    assert not killed.exists() and other.exists() and running.exists()


def test_a_folder_of_an_earlier_version_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".writing_out" / "step_000000").mkdir(parents=True)
    lines: list[str] = []
    with staging_dir(tmp_path / "out", lines.append) as folder:
        assert not list(folder.iterdir())
    assert len(lines) == 1 and not (tmp_path / ".writing_out").exists()


def test_without_locks_a_folder_that_is_there_is_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("aki_megatron.checkpoint.staging.fcntl.flock", no_locks)
    with staging_dir(tmp_path / "out") as folder:
        (folder / "a").write_text("whole")
        with pytest.raises(CheckpointError, match="being written by another"), staging_dir(tmp_path / "out"):
            pytest.fail("worked")
    assert (tmp_path / "out" / "a").read_text() == "whole"


WAIT = """
import sys, time
sys.path.insert(0, sys.argv[1])
import convert
from aki_megatron.checkpoint import conversions
def wait(*_, **__):
    print("writing", flush=True)
    time.sleep(60)
conversions.write_weights = wait
sys.exit(convert.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    ("number", "line"),
    [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "ended by SIGTERM"), (signal.SIGHUP, "the terminal closed")],
)
def test_a_signal_ends_a_conversion_with_one_line(
    number: signal.Signals, line: str, siglip: Path, tmp_path: Path
) -> None:
    lm, out = language_folder(tmp_path / "lm", "Qwen3-8B"), tmp_path / "out"
    arguments = ("from-hf", "--lm", lm, "--vision", siglip, "--skip-logits-check", "--out", out)
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, str(TOOL.parent), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert (tmp_path / ".writing_out").is_dir()
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == f"convert: {line}; nothing is left of the output.\n"
    assert process.returncode == 128 + number
    assert [path.name for path in tmp_path.iterdir()] == ["lm"]


def test_ctrl_c_while_the_libraries_load_is_one_line(tmp_path: Path) -> None:
    for seconds in (0.3, 0.8):
        process = subprocess.Popen(
            [sys.executable, str(TOOL), "verify", str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(TOOL.parents[1])},
        )
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert errors == "convert: interrupted; nothing is left of the output.\n" and process.returncode == 130


def test_numbers_and_paths_of_flags(
    convert: Run, tmp_path: Path, siglip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "out"
    result = convert("from-hf", "--lm=~/none", f"--vision={siglip}", "--out", out)
    assert f"{tmp_path / 'none'} does not exist" in refused(result, out)
    for flag in ("--out=", "--seed=-1", "--seed=1.5", f"--seed={2**64}", "--files=99999999999999999999"):
        with pytest.raises(SystemExit) as code:
            convert("from-hf", f"--lm={siglip}", f"--vision={siglip}", "--out", out, flag)
        assert code.value.code == 2
