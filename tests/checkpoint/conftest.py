"""tools/convert.py in this process, and tiny folders for it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_folders import vision_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Run:
    """``convert(argument, ...)`` returns the exit code, stdout and stderr."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    try:
        import convert as tool
    finally:
        sys.path.pop(0)

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = tool.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny SigLIP."""
    return vision_folder(tmp_path_factory.mktemp("siglip"))
