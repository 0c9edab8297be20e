"""The only way to rich: consoles that print every text as it is.

rich takes ``[red]`` for markup and ``:smile:`` for an emoji, and fails at ``[/INST]``. Captions, paths and error
messages are foreign text, so nothing is interpreted here; colours come from ``styled``. Other modules import rich's
names from here (tests/test_architecture.py).
"""

import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

__all__ = ["Console", "IsolatedConsole", "Progress", "Table", "Text", "progress_bar", "styled"]

logger = logging.getLogger("aki_megatron")


class Console(rich.console.Console):
    """A rich console that interprets nothing in the texts it prints, those of tables included."""

    def __init__(
        self,
        file: IO[str] | None = None,
        *,
        width: int | None = None,
        no_color: bool | None = None,
        quiet: bool = False,
    ) -> None:
        """``file`` is standard output by default."""
        super().__init__(
            file=file, width=width, no_color=no_color, quiet=quiet, markup=False, emoji=False, highlight=False
        )
        # foreign text may hold what the encoding of the terminal lacks
        with suppress(AttributeError, ValueError, OSError):
            self.file.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]


class IsolatedConsole(Console):
    """A console whose failure (closed pipe, vanished terminal, full disk) does not end the caller.

    ``print`` reports the first failure to ``on_failure``, which may be set at any time, and prints nothing after it.
    """

    def __init__(self, file: IO[str] | None = None, *, width: int | None = None, quiet: bool = False) -> None:
        super().__init__(file, width=width, quiet=quiet)
        self.on_failure: Callable[[Exception], None] = _log_failure

    def print(self, *objects: Any, **options: Any) -> None:
        """Print as rich does, unless printing has failed."""
        try:
            super().print(*objects, **options)
        except Exception as error:
            self.quiet = True
            self._discard_unwritten()
            self.on_failure(error)

    def on_broken_pipe(self) -> None:
        """Raise the active BrokenPipeError, where rich would end the process."""
        raise  # noqa: PLE0704  # called by rich in an except clause

    def _discard_unwritten(self) -> None:
        """Send what standard output holds back to nowhere: Python would write it at exit, fail, and return 120."""
        if self.file is not sys.stdout:
            return
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)


def _log_failure(error: Exception) -> None:
    logger.error("nothing can be printed any more: %s: %s", type(error).__name__, error)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Join texts, and pairs of a text and its style such as ``("done", "bold green")``."""
    return Text.assemble(*parts)


def progress_bar(title: str, detail: str = "", *, console: Console | None = None) -> Progress:
    """Build a progress bar.

    title   constant text before the bar
    detail  format of what follows it, for example ``loss {task.fields[loss]:.3f}``
    """
    columns = [TextColumn(title, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    if detail:
        columns.append(TextColumn(detail, markup=False))
    return Progress(*columns, console=console or Console())
