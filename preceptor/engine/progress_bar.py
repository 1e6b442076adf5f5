"""The progress of long work on stderr: of a run, of a capture, of requests, of answers that are written."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from preceptor.engine.metrics import Line


class Bar:
    """A progress bar on a terminal, drawn at most twice a second; elsewhere a plain line every 15 seconds.

    ``shown`` is False in every process but the first; ``timed`` adds the time left on a terminal. As a context it
    leaves the terminal as it was.
    """

    def __init__(self, label: str, *, shown: bool = True, timed: bool = True) -> None:
        self._label, self._shown, self._timed = label, shown, timed
        self._console = Console(stderr=True)
        self._pause = 0.5 if self._console.is_terminal else 15.0
        self._drawn = time.monotonic()
        self._progress: Progress | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def due(self) -> bool:
        """Whether it is time to show something again."""
        return self._shown and time.monotonic() - self._drawn >= self._pause

    def show(self, done: int, total: int, text: str = "") -> None:
        """Show now that ``done`` of ``total`` is finished, and what was measured."""
        if not self._shown:
            return
        self._drawn = time.monotonic()
        if not self._console.is_terminal:
            print(f"{self._label} {done}/{total}  {text}".strip(), file=sys.stderr, flush=True)
            return
        if self._progress is None:
            self._progress = self._begun(total, done)
        self._progress.update(self._progress.task_ids[0], completed=done, total=total, description=text)
        self._progress.refresh()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _begun(self, total: int, done: int) -> Progress:
        # The text gives way on a narrow terminal, the count and the time left do not.
        kept = Column(no_wrap=True)
        rest = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
        left = (TimeRemainingColumn(table_column=kept), TextColumn("left", table_column=kept)) if self._timed else ()
        label, count = TextColumn(self._label, table_column=kept), MofNCompleteColumn(table_column=kept)
        columns = (label, count, BarColumn(bar_width=16), *left, rest)
        progress = Progress(*columns, console=self._console, auto_refresh=False, expand=True)
        progress.start()
        progress.add_task("", total=total, completed=done)
        return progress


def describe(line: Line) -> str:
    """A line of metrics in short: examples a second, the loss and its parts."""
    silent = ("count", "memory_mib", "learning_rate", "gradient_norm", "items_per_second", "count_per_second")
    shown = [f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float) and name not in silent]
    return "  ".join([f"{line.get('items_per_second') or 0:.4g} items/s", *shown])
