"""The blocks of docs/own_data.md that draw, check and show data are run as a user would run them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aki_megatron.config.data import ColumnsConfig, SourceConfig
from aki_megatron.config.datasets import OWN_FORMATS
from aki_megatron.synthetic.demo_tokenizer import write_tokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/own_data.md").read_text()
BLOCKS = re.findall(r"^```(?:python)?\n(# .*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def block(beginning: str) -> str:
    (found,) = [block for block in BLOCKS if block.startswith(f"# {beginning}")]
    return found


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the demo's tokenizer, in which the page's pictures are drawn."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("tools", "configs"):
        (folder / name).symlink_to(ROOT / name)
    write_tokenizer(folder / "data/demo/tokenizer")
    run([sys.executable, "-c", block("Draw")], folder)
    return folder


def test_the_drawn_file_is_the_one_that_the_page_shows(checkout: Path) -> None:
    assert (checkout / "data/own/chat.jsonl").read_text().splitlines()[0] in PAGE


@pytest.mark.parametrize("beginning", ["Check", "Look"])
def test_the_page_shows_what_its_commands_print(checkout: Path, beginning: str) -> None:
    command = block(beginning).splitlines()[1].split()
    assert command[0] == "python"
    if beginning == "Check":
        command += ["--workers", "1"]
    printed = run([sys.executable, *command[1:]], checkout)
    if beginning == "Check":
        shown = PAGE.partition("mine: 20 records\n")[2].partition("```")[0]
        assert [line for line in shown.splitlines() if line not in printed] == []
    else:
        shown = PAGE.partition("...<|end|>")[2].partition("```")[0]
        assert shown.count("\n") == 2 and shown in printed


def test_the_page_names_every_key() -> None:
    table = PAGE.partition("## Formats")[2]
    own = set(SourceConfig.model_fields) | set(ColumnsConfig.model_fields) | set(OWN_FORMATS)
    assert {name for name in own if f"`{name}" not in table and f"{name}:" not in table} == set()
