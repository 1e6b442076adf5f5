"""One ``ask``: what the cache knows is taken from it, the rest is called for, many at a time, and kept as it comes."""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from preceptor.language.limits import LONGEST_WAIT, Limits, Meter, Pace, back_off
from preceptor.language.messages import Answer, Backend, CallFailed, Reply, Request
from preceptor.language.progress import Ticker
from preceptor.language.store import Kept, Store, key_of
from preceptor.language.structured import corrected, instructed, read_json

T = TypeVar("T")

FAILURES_IN_A_ROW = 8  # calls that failed at every attempt, before the endpoint is taken to be gone


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
                    raise CallFailed(f"{failed.reason}{tried}", again=failed.again) from None
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
                said = await make()
            prompt, completion = taken(said)
            return said
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


@dataclass
class Job:
    """A request on its way to a reply. ``call`` is what is sent now: with the schema and the attempts so far."""

    asked: Request
    places: list[int]
    call: Request
    key: bytes
    attempt: int = 1
    prompt_tokens: int = 0
    completion_tokens: int = 0
    called: bool = False


class Asking:
    """The work of one ``ask``."""

    def __init__(self, backend: Backend, store: Store | None, gate: Gate, requests: Sequence[Request]) -> None:
        self._backend, self._store, self._gate = backend, store, gate
        self._replies: list[Reply] = [Reply()] * len(requests)
        self._queue: deque[Job] = deque()
        self._stopped = ""
        self._in_a_row = 0
        self._ticker: Ticker | None = None
        self.jobs = self._plan(requests)

    def _plan(self, requests: Sequence[Request]) -> list[Job]:
        """One job a request; where answers are kept, equal requests share one."""
        jobs: dict[object, Job] = {}
        for place, request in enumerate(requests):
            call = instructed(request)
            key = key_of(self._backend.identity, call) if self._store else b""
            job = jobs.setdefault(key or place, Job(request, [], call, key))
            job.places.append(place)
        return list(jobs.values())

    def look_up(self, *, again: bool) -> list[Job]:
        """Take from the cache what it has; returns the jobs that need a call. ``again``: failures are such."""
        if self._store is None:
            return self.jobs
        open_jobs, asked = [], self.jobs
        while asked:
            found = self._store.find([job.key for job in asked])
            going = []
            for job in asked:
                if job.key not in found:
                    open_jobs.append(job)
                    continue
                answer, error = found[job.key]
                if error and again:
                    open_jobs.append(job)
                elif error:
                    self._reply(job, Reply(answer.text, error=error))
                elif self._advance(job, answer):
                    going.append(job)
                elif again and self._replies[job.places[0]].error:  # the limit on attempts is another one now
                    job.prompt_tokens -= answer.prompt_tokens
                    job.completion_tokens -= answer.completion_tokens
                    open_jobs.append(job)
            asked = going
        return sorted(open_jobs, key=lambda job: job.places[0])

    async def run(self, open_jobs: Iterable[Job], ticker: Ticker) -> list[Reply]:
        """Call for what is open, and give all replies."""
        self._queue.extend(open_jobs)
        self._ticker = ticker
        number = min(self._gate.limits.concurrency, len(self._queue))
        workers = [asyncio.ensure_future(self._work()) for _ in range(number)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._backend.close()
        for job in self._queue:
            self._reply(job, Reply(error=f"not answered: {self._stopped}"))
        return self._replies

    async def _work(self) -> None:
        while self._queue and not self._stopped:
            jobs = self._take()
            try:
                await self._call(jobs)
            except Stopped as stop:
                self._stopped = self._stopped or str(stop)
                self._queue.extendleft(reversed(jobs))

    def _take(self) -> list[Job]:
        """The next jobs, as many as one call takes and the budget allows, but at least one."""
        jobs = [self._queue.popleft() for _ in range(min(self._backend.group, len(self._queue)))]
        while len(jobs) > 1:
            size = self._size(jobs)
            if not self._gate.meter.lacks(size.calls, size.prompt, size.completion):
                break
            self._queue.appendleft(jobs.pop())
        return jobs

    def _size(self, jobs: Sequence[Job]) -> Size:
        prompt = sum(self._backend.prompt_bound(job.call) for job in jobs)
        return Size(len(jobs), prompt, sum(job.call.max_tokens for job in jobs))

    async def _call(self, jobs: list[Job]) -> None:
        """Make one call for these jobs, and keep what it gives before anything else is begun."""
        try:
            said = await self._gate.call(
                self._size(jobs), lambda: self._backend.answer([job.call for job in jobs]), _taken
            )
            self._in_a_row = 0
        except CallFailed as failed:
            said = [failed] * len(jobs)
            self._in_a_row += failed.again
            if self._in_a_row >= max(FAILURES_IN_A_ROW, 2 * self._gate.limits.concurrency):
                why = f"{self._in_a_row} calls failed one after another, the last with: {failed.reason}"
                self._stopped = self._stopped or why
        kept, going = [], []
        for job, answer in zip(jobs, said):
            job.called = True
            key, asked = job.key, job.asked
            if isinstance(answer, CallFailed):
                kept.append(Kept(key, asked, Answer("", 0, 0), answer.reason))
                self._fail(job, answer.reason)
                continue
            if self._advance(job, answer):
                going.append(job)
            place = job.places[0]
            kept.append(Kept(key, asked, answer, "" if job in going else self._replies[place].error))
        if self._store is not None:
            self._store.keep(self._backend.identity, kept)
        self._queue.extendleft(reversed(going))

    def _advance(self, job: Job, answer: Answer) -> bool:
        """Take an answer: True if the job goes on with another attempt, else its reply is set."""
        job.prompt_tokens += answer.prompt_tokens
        job.completion_tokens += answer.completion_tokens
        reply = Reply(answer.text, job.prompt_tokens, job.completion_tokens, cached=not job.called, cut=answer.cut)
        if job.asked.schema is None:
            self._reply(job, reply)
            return False
        data, wrong = read_json(answer.text, job.asked.schema, cut=answer.cut)
        if not wrong:
            self._reply(job, replace(reply, data=data))
            return False
        if job.attempt >= self._gate.limits.schema_attempts:
            tried = f"{job.attempt} attempts" if job.attempt > 1 else "one attempt"
            self._reply(
                job, replace(reply, error=f"no answer that fits the schema in {tried}; of the last one: {wrong}")
            )
            return False
        job.attempt += 1
        job.call = corrected(job.call, answer.text, wrong)
        job.key = key_of(self._backend.identity, job.call) if self._store else b""
        return True

    def _fail(self, job: Job, reason: str) -> None:
        self._reply(job, Reply("", job.prompt_tokens, job.completion_tokens, error=reason))

    def _reply(self, job: Job, reply: Reply) -> None:
        first, *others = job.places
        self._replies[first] = reply
        for place in others:
            self._replies[place] = replace(reply, cached=True)
        if self._ticker is not None:
            self._ticker.count(len(job.places), failed=bool(reply.error), spent=self._gate.meter.spent)


def _taken(said: Sequence[Answer | CallFailed]) -> tuple[int, int]:
    answers = [answer for answer in said if isinstance(answer, Answer)]
    return sum(answer.prompt_tokens for answer in answers), sum(answer.completion_tokens for answer in answers)
