"""How much may be spent on calls, how fast they may be made, and how long to wait after one that failed."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from preceptor.errors import UserError

WINDOW = 60.5  # seconds: a minute, and what the ways to the endpoint may differ in length


LONGEST_WAIT = 600.0  # seconds: an endpoint that asks for more patience has failed


FIRST_WAIT = 0.5  # seconds before the first repetition; doubles with each


@dataclass(frozen=True)
class Budget:
    """What one chat may spend in its life. None sets no limit; what the cache answers costs nothing."""

    calls: int | None = None
    """Requests sent to the backend, every repetition after a failure counted."""
    tokens: int | None = None
    """Tokens read and written together."""
    cost: float | None = None
    """Money, in the currency of the prices."""
    prompt_price: float = 0.0
    """Money for a million tokens read."""
    completion_price: float = 0.0
    """Money for a million tokens written."""

    def __post_init__(self) -> None:
        """Refuses limits and prices that cannot be meant."""
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value >= 0:
                raise UserError(f"The budget's {name} is {value}: it must be 0 or more.")
        if self.cost is not None and not self.prompt_price + self.completion_price:
            raise UserError("The budget limits the cost but no price is set: give prompt_price and completion_price.")

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Money for so many tokens read and written."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / 1e6


@dataclass(frozen=True)
class Limits:
    """How fast, how often and how long a backend is asked. None sets no limit."""

    concurrency: int = 16
    """Calls under way at once."""
    requests_per_minute: int | None = None
    """Calls begun within any 60 seconds."""
    tokens_per_minute: int | None = None
    """Tokens, read and written, of the calls begun within any 60 seconds."""
    attempts: int = 6
    """How often a call is made at most when the endpoint is busy, fails or does not answer."""
    call_seconds: float = 120.0
    """How long a call may take; a local model cannot be stopped within a batch."""
    total_seconds: float | None = None
    """How long one ``ask`` may take; what is not answered by then carries an error."""
    schema_attempts: int = 3
    """How often a structured answer is asked for at most, each time with what was wrong."""

    def __post_init__(self) -> None:
        """Refuses limits that let nothing through."""
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not value > 0:
                raise UserError(f"The limit {name} is {value}: it must be more than 0.")


class Spent(NamedTuple):
    """Calls, tokens and money: what was spent, or what a call may come to at most."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens read and written."""
        return self.prompt_tokens + self.completion_tokens


class Meter:
    """Counts what is spent. A call is reserved at the most it can come to, and settled at what it came to.

    A call begins only if it fits beside everything spent and reserved, so a limit is never passed, as long as the
    backend holds to ``max_tokens`` and a prompt has no more tokens than ``Backend.prompt_bound`` gives.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._calls = self._prompt = self._completion = 0
        self._held_prompt = self._held_completion = 0

    def lacks(self, calls: int, prompt: int, completion: int) -> str:
        """Which limit a call could pass that comes to at most so much, as a sentence; empty if it fits."""
        budget = self.budget
        if budget.calls is not None and self._calls + calls > budget.calls:
            return f"the budget of {budget.calls:,} calls is used up"
        prompt += self._prompt + self._held_prompt
        completion += self._completion + self._held_completion
        if budget.tokens is not None and prompt + completion > budget.tokens:
            return f"the rest of the budget of {budget.tokens:,} tokens is less than the next call may take"
        if budget.cost is not None and budget.price(prompt, completion) > budget.cost:
            return f"the rest of the budget of {budget.cost:g} is less than the next call may cost"
        return ""

    def reserve(self, calls: int, prompt: int, completion: int) -> None:
        """Begin a call; its number counts at once, its tokens are held."""
        self._calls += calls
        self._held_prompt += prompt
        self._held_completion += completion

    def settle(self, prompt: int, completion: int, taken_prompt: int, taken_completion: int) -> None:
        """End a call that held so many tokens and took so many."""
        self._held_prompt -= prompt
        self._held_completion -= completion
        self._prompt += taken_prompt
        self._completion += taken_completion

    @property
    def spent(self) -> Spent:
        """What was spent so far; calls under way count as calls only."""
        cost = self.budget.price(self._prompt, self._completion)
        return Spent(self._calls, self._prompt, self._completion, cost)


@dataclass
class Begun:
    """When a call began, and the tokens that it counts for."""

    at: float
    calls: int
    tokens: int


class Pace:
    """Holds calls to the limits per minute, over every window of a minute and not only on average.

    Times are those of one monotonic clock, in seconds.
    """

    def __init__(self, limits: Limits) -> None:
        self._requests = limits.requests_per_minute
        self._tokens = limits.tokens_per_minute
        self._begun: deque[Begun] = deque()
        self._sum_calls = self._sum_tokens = 0
        self._paused_until = 0.0

    def never(self, calls: int, tokens: int) -> str:
        """Why a call can never begin, as a sentence; empty if it can."""
        if self._requests is not None and calls > self._requests:
            return f"one call sends {calls} requests, more than the {self._requests} requests per minute that are set"
        if self._tokens is not None and tokens > self._tokens:
            return f"it may take {tokens:,} tokens, more than the {self._tokens:,} tokens per minute that are set"
        return ""

    def wait(self, now: float, calls: int, tokens: int) -> float:
        """Seconds until such a call may begin; 0 if it may now."""
        if now < self._paused_until:
            return self._paused_until - now
        if self._requests is None and self._tokens is None:
            return 0.0
        while self._begun and self._begun[0].at <= now - WINDOW:
            gone = self._begun.popleft()
            self._sum_calls, self._sum_tokens = self._sum_calls - gone.calls, self._sum_tokens - gone.tokens
        over_calls = 0 if self._requests is None else self._sum_calls + calls - self._requests
        over_tokens = 0 if self._tokens is None else self._sum_tokens + tokens - self._tokens
        until = now
        for call in self._begun:
            if over_calls <= 0 and over_tokens <= 0:
                break
            over_calls, over_tokens = over_calls - call.calls, over_tokens - call.tokens
            until = call.at + WINDOW
        return max(0.0, until - now)

    def begin(self, now: float, calls: int, tokens: int) -> Begun:
        """Note a call that takes at most so many tokens."""
        begun = Begun(now, calls, tokens)
        if self._requests is not None or self._tokens is not None:
            self._begun.append(begun)
            self._sum_calls, self._sum_tokens = self._sum_calls + calls, self._sum_tokens + tokens
        return begun

    def settle(self, begun: Begun, tokens: int) -> None:
        """Note how many tokens it took. One that began more than a minute ago counts no more."""
        if self._begun and begun.at >= self._begun[0].at:
            self._sum_tokens += tokens - begun.tokens
        begun.tokens = tokens

    def pause(self, until: float) -> None:
        """Let no call begin before."""
        self._paused_until = max(self._paused_until, until)


def back_off(attempt: int, asked: float | None, draw: random.Random) -> float:
    """Seconds to wait after attempt number ``attempt`` (the first is 1) has failed.

    Doubles from half a second up to a minute, of which a random half is taken off, so that calls which failed together
    are not made again together. ``asked``: what the endpoint asked for (Retry-After); never less, and a little more.
    """
    longest = min(60.0, FIRST_WAIT * 2.0 ** (attempt - 1))
    if asked is None:
        return longest * draw.uniform(0.5, 1.0)
    return asked + draw.uniform(0.0, min(1.0, longest))
