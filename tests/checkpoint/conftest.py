"""tools/convert.py in this process, and tiny folders for it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_folders import vision_folder

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Run:
    """``convert(word, ...)``: exit code, what the tool printed, and its errors."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    try:
        import convert as tool
    finally:
        sys.path.pop(0)

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = tool.main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture(scope="session")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a tiny SigLIP."""
    return vision_folder(tmp_path_factory.mktemp("siglip"))
