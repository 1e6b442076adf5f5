"""What a run says while it works: a line a step in ``metrics.jsonl``, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from preceptor.checkpoint import writable

Line = dict[str, float | int | str | None]


class Metrics:
    """``metrics.jsonl``: lines are held back for at most a second, and never past a checkpoint."""

    def __init__(self, path: Path, *, length: int = 0) -> None:
        """Opens the file and cuts it to `length` bytes: those that stood there at the checkpoint resumed from."""
        with writable(path.parent, path.name):
            self._file: IO[bytes] = path.open("ab")
            self._file.truncate(min(length, path.stat().st_size))
        self._folder = path.parent
        self._held: list[str] = []
        self._flushed = time.monotonic()

    def write(self, line: Mapping[str, float | int | str | None]) -> None:
        """Adds one line; a number that JSON does not know (infinite, not a number) is written as null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._held.append(json.dumps(clean))
        if time.monotonic() - self._flushed > 1.0:
            self.flush()

    def flush(self, *, to_disk: bool = False) -> int:
        """Hands the held lines to the system (to the disk itself if asked); returns the file's length in bytes."""
        with writable(self._folder, "metrics.jsonl"):
            if self._held:
                self._file.write(("\n".join(self._held) + "\n").encode())
            self._file.flush()
            if to_disk:
                os.fsync(self._file.fileno())
        self._held.clear()
        self._flushed = time.monotonic()
        return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self.flush()
        self._file.close()


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
