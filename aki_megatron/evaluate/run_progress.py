"""Show how far a run on benchmarks is: a bar on a terminal, a line now and then elsewhere."""

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta

from aki_megatron.console import Console, progress_bar

LINE_SECONDS = 15.0
"""Between two lines where the output is no terminal."""

BAR_SECONDS = 0.5

RATE_SECONDS = 120.0
"""Over which the rate is measured: benchmarks differ, so the mean since the start says little about what is left."""


class RunProgress:
    """Progress of all processes together; on rank 0."""

    def __init__(
        self,
        total: int,
        done: int,
        console: Console,
        *,
        line_seconds: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with ``done`` of ``total`` questions answered before."""
        self._total, self._done = total, done
        self._console, self._clock = console, clock
        self._began = clock()
        self._points: deque[tuple[float, int]] = deque([(self._began, 0)])
        is_terminal = console.file.isatty()  # rich takes a file for a terminal where FORCE_COLOR is set
        self._seconds = BAR_SECONDS if is_terminal else line_seconds
        self._last_shown = self._began
        self._bar = progress_bar("answered", "{task.fields[text]}", console=console) if is_terminal else None
        if self._bar is not None:
            self._task = self._bar.add_task("questions", total=total, completed=done, text="")
            self._bar.start()

    def show(self, answered: int, num_errors: int, benchmark: str) -> None:
        """Take the questions that this start has answered, those of them that could not be asked, and what is next.

        Shows them if that is due.
        """
        now = self._clock()
        if now - self._last_shown < self._seconds:
            return
        self._last_shown = now
        self._points.append((now, answered))
        while len(self._points) > 2 and now - self._points[0][0] > RATE_SECONDS:
            self._points.popleft()
        text = self._text(num_errors, benchmark)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done + answered, text=text)
        else:
            self._console.print(f"answered {self._done + answered:,} of {self._total:,}  {text}", soft_wrap=True)

    def finish(self, answered: int, num_errors: int) -> None:
        """Show the totals."""
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done + answered, text="")
            self._bar.stop()
        seconds = max(self._clock() - self._began, 1e-9)
        line = f"answered {self._done + answered:,} of {self._total:,} questions"
        if answered:
            line += f": {answered:,} in {timedelta(seconds=round(seconds))}, {answered / seconds:.2f} answers/s"
        if num_errors:
            line += f"; {num_errors:,} of them could not be asked"
        self._console.print(line, soft_wrap=True)

    def rate(self) -> float:
        """Answers per second of late; 0 before the first."""
        (first, before), (last, after) = self._points[0], self._points[-1]
        return (after - before) / (last - first) if last > first else 0.0

    def _text(self, num_errors: int, benchmark: str) -> str:
        rate = self.rate()
        left = self._total - self._done - self._points[-1][1]
        parts = [f"{rate:.2f} answers/s"]
        if rate:
            parts.append(f"time left {timedelta(seconds=round(left / rate))}")
        if benchmark:
            parts.append(benchmark)
        if num_errors:
            parts.append(f"{num_errors:,} could not be asked")
        return "  ".join(parts)
