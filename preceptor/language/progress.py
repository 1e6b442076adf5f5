"""How far an ``ask`` is: a bar on a terminal, elsewhere a line every 15 seconds."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

from preceptor.language.limits import Budget, Spent


class Ticker:
    """Counts replies and shows their rate, what failed, what was spent, and the time left.

    ``total``: the requests of this ``ask``. ``before``: what had been spent when it began.
    """

    def __init__(self, total: int, budget: Budget, before: Spent, *, shown: bool) -> None:
        self._total, self._budget, self._before = total, budget, before
        self._done = self._found = self._failed = 0
        self._shown = shown
        self._console = Console(stderr=True) if shown else None
        self._pause = 0.5 if self._console and self._console.is_terminal else 15.0
        self._began = self._drawn = time.monotonic()
        self._progress: Progress | None = None

    def count(self, replies: int, *, failed: bool, called: bool, spent: Spent) -> None:
        """So many replies more, whether they were called for or found in the cache, and all that is spent by now."""
        self._done += replies
        self._found += 0 if called else replies
        self._failed += replies if failed else 0
        now = time.monotonic()
        if not self._shown or now - self._drawn < self._pause:
            return
        self._drawn = now
        text = self.describe(now - self._began, spent)
        if self._pause > 1:
            print(f"{self._done:,}/{self._total:,}  {text}", file=sys.stderr, flush=True)
            return
        if self._progress is None:
            rest = TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
            count = MofNCompleteColumn(table_column=Column(no_wrap=True))
            columns = (count, BarColumn(bar_width=16), rest)
            self._progress = Progress(*columns, console=self._console, auto_refresh=False, expand=True)
            self._progress.start()
            self._progress.add_task(text, total=self._total, completed=self._done)
        self._progress.update(self._progress.task_ids[0], completed=self._done, description=text)
        self._progress.refresh()

    def describe(self, seconds: float, spent: Spent) -> str:
        """Time left, rate, cost, tokens and failures after so many seconds, in one line."""
        answered = self._done - self._found
        rate = answered / seconds if seconds > 0 else 0.0
        left = (self._total - self._done) / rate if rate else 0.0
        tokens = spent.tokens - self._before.tokens
        parts = [f"{_clock(left)} left", f"{rate:.3g}/s", f"{tokens:,} tokens"]
        if spent.cost:
            limit = f" of {self._budget.cost:g}" if self._budget.cost is not None else ""
            parts.append(f"cost {spent.cost:.4g}{limit}")
        if self._found:
            parts.append(f"{self._found:,} from the cache")
        if self._failed:
            parts.append(f"{self._failed:,} failed")
        return "  ".join(parts)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
