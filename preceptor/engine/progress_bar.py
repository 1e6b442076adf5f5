"""The progress bar of a run."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from preceptor.engine.metrics import Line


class Bar:
    """A progress bar on a terminal, drawn at most twice a second; elsewhere a plain line every 15 seconds."""

    def __init__(self, *, shown: bool) -> None:
        """`shown` is False in every process but the first."""
        self._console = Console(stderr=True)
        self._shown = shown
        self._pause = 0.5 if self._console.is_terminal else 15.0
        self._drawn = time.monotonic()
        self._progress: Progress | None = None

    def show(self, step: int, total: int, line: Line) -> None:
        """Shows the line of `step` out of `total`, if it is time."""
        now = time.monotonic()
        if not self._shown or (now - self._drawn < self._pause and step < total):
            return
        self._drawn = now
        text = _describe(line)
        if not self._console.is_terminal:
            print(f"step {step}/{total}  {text}", file=sys.stderr, flush=True)
            return
        if self._progress is None:
            # The text gives way on a narrow terminal, the count and the time left do not.
            rest = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
            bar, left = BarColumn(bar_width=16), TimeRemainingColumn(table_column=Column(no_wrap=True))
            count = MofNCompleteColumn(table_column=Column(no_wrap=True))
            columns = (count, bar, left, TextColumn("left", table_column=Column(no_wrap=True)), rest)
            self._progress = Progress(*columns, console=self._console, auto_refresh=False, expand=True)
            self._progress.start()
            self._progress.add_task(text, total=total, completed=step)
        self._progress.update(self._progress.task_ids[0], completed=step, description=text)
        self._progress.refresh()

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _describe(line: Line) -> str:
    silent = ("count", "memory_mib", "learning_rate", "gradient_norm", "items_per_second", "count_per_second")
    shown = [f"{name} {value:.4g}" for name, value in line.items() if isinstance(value, float) and name not in silent]
    return "  ".join([f"{line.get('items_per_second') or 0:.4g} items/s", *shown])
