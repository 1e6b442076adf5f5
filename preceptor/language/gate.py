"""The gate that every call to a language model passes: how many run at once, and when no more may start."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

from preceptor.data.readers import Message
from preceptor.language.limits import LONGEST_WAIT, Limits, Meter, Pace, back_off
from preceptor.language.messages import CallFailed

T = TypeVar("T")


class Stopped(Exception):
    """No more calls may begin, for a reason that is the error's text."""


@dataclass(frozen=True)
class Size:
    """What a call is at most: how many requests, and the tokens that they may read and write."""

    calls: int
    prompt: int
    completion: int


@dataclass
class Gate:
    """Lets a call begin when budget and pace allow it, and makes it again when it failed for a time."""

    meter: Meter
    pace: Pace
    limits: Limits
    draw: random.Random
    deadline: float = float("inf")
    under_way: int = 0
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, size: Size, make: Callable[[], Awaitable[T]], taken: Callable[[T], tuple[int, int]]) -> T:
        """Make a call, up to ``attempts`` times; ``taken`` tells the tokens read and written from what it gives.

        Raises:
            CallFailed: the last attempt failed, or the reason is not one that passes.
            Stopped: the budget or the time is used up.
        """
        attempt = 1
        while True:
            await self._begin(size)
            try:
                return await self._make(size, make, taken)
            except CallFailed as failed:
                pause = back_off(attempt, failed.wait, self.draw)
                if not failed.again or attempt >= self.limits.attempts:
                    tried = f", after {attempt} attempts" if attempt > 1 else ""
                    raise CallFailed(f"{failed.reason}{tried}", again=failed.again, status=failed.status) from None
                if pause > LONGEST_WAIT:
                    why = f"{failed.reason}; the endpoint asks to wait {pause:.0f} s, which is too long"
                    raise CallFailed(why) from None
                if time.monotonic() + pause > self.deadline:
                    raise CallFailed(f"{failed.reason}; no time was left to try again") from None
                if failed.wait:
                    self.pace.pause(time.monotonic() + failed.wait)
            attempt += 1
            await asyncio.sleep(pause)

    async def _begin(self, size: Size) -> None:
        """Wait until the call may begin; nothing comes between the check and the reservation."""
        tokens = size.prompt + size.completion
        if why := self.pace.never(size.calls, tokens):
            raise CallFailed(why)
        while True:
            now = time.monotonic()
            if now >= self.deadline:
                raise Stopped(f"the time of {self.limits.total_seconds:g} s was up")
            if wait := self.pace.wait(now, size.calls, tokens):
                await asyncio.sleep(min(wait, self.deadline - now))
                continue
            lacks = self.meter.lacks(size.calls, size.prompt, size.completion)
            if not lacks:
                return
            if not self.under_way:
                raise Stopped(lacks)
            self.settled.clear()
            await self.settled.wait()

    async def _make(self, size: Size, make: Callable[[], Awaitable[T]], taken: Callable[[T], tuple[int, int]]) -> T:
        now = time.monotonic()
        begun = self.pace.begin(now, size.calls, size.prompt + size.completion)
        self.meter.reserve(size.calls, size.prompt, size.completion)
        self.under_way += 1
        prompt, completion = size.prompt, size.completion
        seconds = min(self.limits.call_seconds, self.deadline - now)
        try:
            with _Within(seconds):
                answer = await make()
            prompt, completion = taken(answer)
            return answer
        except TimeoutError:
            raise CallFailed(f"no answer within {seconds:.3g} s", again=True, charged=True) from None
        except CallFailed as failed:
            if not failed.charged:
                prompt = completion = 0
            raise
        finally:
            # What was broken off, even by Ctrl-C, counts at the most that it can have come to.
            self.meter.settle(size.prompt, size.completion, prompt, completion)
            self.pace.settle(begun, prompt + completion)
            self.under_way -= 1
            self.settled.set()


class _Within:
    """Breaks off what is awaited inside after so many seconds, with a TimeoutError.

    Unlike ``asyncio.wait_for`` it makes no task: each task that a call needs lets all others go first, so that calls
    which came back together would also leave together.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._over = seconds, False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._timer.cancel()
        if self._over and kind is asyncio.CancelledError:
            if sys.version_info >= (3, 11):
                self._task.uncancel()
            raise TimeoutError

    def _expire(self) -> None:
        self._over = True
        self._task.cancel()


@runtime_checkable
class Scorer(Protocol):
    """A backend that can tell how likely a given continuation is."""

    async def log_probabilities(
        self, messages: Sequence[Message], continuations: Sequence[str], gate: Gate
    ) -> list[tuple[float, ...]]:
        """The log-probability of each token of each continuation as the assistant's answer, in nats.

        Every call goes through the gate by itself, so that one that failed is made again alone.

        Raises:
            CallFailed: the endpoint gave no answer.
            Stopped: the budget or the time is used up.
            UserError: the endpoint gives no such probabilities.
        """
        ...
