"""A run folder that cannot be used is one message that names the path."""

import errno
from pathlib import Path

import pytest

from aki_megatron.errors import ConfigError
from aki_megatron.supervise.run_folder import check_run_dir, describe_os_error, open_run_folder
from aki_megatron.supervise.run_paths import RunPaths


def test_a_folder_is_created_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "new/run")
    check_run_dir(paths)
    assert not paths.path.exists()
    open_run_folder(paths)
    assert list(paths.path.iterdir()) == [paths.logs] and list(paths.logs.iterdir()) == []
    link = RunPaths(tmp_path / "link")
    link.path.symlink_to(paths.path)
    check_run_dir(link)
    open_run_folder(link)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("file", "/file is a file, not a folder"),
        ("file/run", "/file is a file, not a folder"),
        ("link", "is a symbolic link to nowhere, which does not exist"),
        ("circle", "its symbolic links go round in a circle"),
        ("x" * 300, "cannot be used: the name is too long for the file system"),
        ("a\0b", "cannot be used: embedded null byte"),
    ],
)
def test_a_path_that_can_be_no_folder(tmp_path: Path, path: str, text: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    paths = RunPaths(tmp_path / path)
    with pytest.raises(ConfigError) as caught:
        check_run_dir(paths)
    message = str(caught.value)
    assert message.startswith(f"run.dir={paths.path}: ") and message.endswith("; choose another --run.dir."), message
    assert text in message or (path == "circle" and "is a symbolic link" in message), message


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_cannot_be_written(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, data: bytes) -> int:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(ConfigError) as caught:
        open_run_folder(RunPaths(tmp_path))
    assert describe_os_error(OSError(number, "no")) in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_folder_where_none_can_be_created() -> None:
    paths = RunPaths(Path("/proc/run"))
    check_run_dir(paths)
    with pytest.raises(ConfigError, match="run.dir=/proc/run: /proc/run cannot be used: "):
        open_run_folder(paths)
