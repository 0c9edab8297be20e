"""Consoles print foreign text as it is, and one that is isolated survives a terminal that is gone."""

import io
import subprocess
import sys

import pytest

from aki_megatron.console import Console, IsolatedConsole, Table, progress_bar, styled

FOREIGN = "[/INST] [red]red[/red] :smile: [bold]x"


def test_texts_tables_and_bars_are_printed_as_they_are() -> None:
    out = io.StringIO()
    console = Console(out, width=200)
    console.print(FOREIGN)
    console.print(styled(("done", "bold green"), f": {FOREIGN}"))
    table = Table(FOREIGN, title=FOREIGN)
    table.add_row(FOREIGN)
    console.print(table)
    with progress_bar(FOREIGN, "loss {task.fields[loss]}", console=console) as bar:
        bar.add_task(FOREIGN, total=1, loss=FOREIGN)
        bar.console.print(FOREIGN)
    assert out.getvalue().count(FOREIGN) == 8


class Broken(io.StringIO):
    """A file whose writes fail."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), OSError(28, "No space left on device"),
     ValueError("I/O operation on closed file")],
)  # fmt: skip
def test_an_isolated_console_reports_its_failure_once(error: Exception) -> None:
    console, failures = IsolatedConsole(Broken(error)), []
    console.on_failure = failures.append
    console.print("one")
    console.print("two")
    assert failures == [error]


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Console(file).print("caf\u00e9 \ud800")
    assert file.buffer.getvalue() == b"caf\\xe9 \\ud800\n"


PRINT = (
    "from aki_megatron.console import IsolatedConsole; console = IsolatedConsole(); "
    "[console.print('x') for _ in range(9)]"
)


@pytest.mark.parametrize("command", ["exec >&-; {}", "{} >/dev/full", "({}; echo code $? >&2) | true"])
def test_a_process_whose_output_is_gone_ends_well(command: str) -> None:
    line = command.format(f'"{sys.executable}" -c "{PRINT}"')
    result = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "code" not in result.stderr or "code 0" in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr, result.stderr
