"""The progress of an ``ask``: what its bar shows of rate, cost, failures and the time left."""

from __future__ import annotations

import time

from preceptor.engine.progress_bar import Bar
from preceptor.language.limits import Budget, Spent


class Ticker:
    """Counts replies and shows their rate, what failed, what was spent, and the time left.

    ``total``: the requests of this ``ask``. ``before``: what had been spent when it began.
    """

    def __init__(self, total: int, budget: Budget, before: Spent, *, shown: bool) -> None:
        self._total, self._budget, self._before = total, budget, before
        self._done = self._found = self._failed = 0
        self._bar = Bar("replies", shown=shown, timed=False)
        self._began = time.monotonic()

    def count(self, replies: int, *, failed: bool, called: bool, spent: Spent) -> None:
        """Add replies, whether the model was called for them or they were in the cache; ``spent`` is the sum by now."""
        self._done += replies
        self._found += 0 if called else replies
        self._failed += replies if failed else 0
        if self._bar.due:
            self._bar.show(self._done, self._total, self.describe(time.monotonic() - self._began, spent))

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
        self._bar.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
