"""One ``ask``: what the cache knows is taken from it, the rest is called for, many at a time, and kept as it comes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from preceptor.language.gate import Gate, Size, Stopped
from preceptor.language.messages import Answer, Backend, CallFailed, Reply, Request
from preceptor.language.progress import Ticker
from preceptor.language.store import AT_ONCE, Store, StoredAnswer, key_of
from preceptor.language.structured import corrected, instructed, read_json

FAILURES_IN_A_ROW = 8  # calls that failed at every attempt, before the endpoint is taken to be gone


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
    done: bool = False


class Asking:
    """The work of one ``ask``."""

    def __init__(self, backend: Backend, store: Store | None, gate: Gate, requests: Sequence[Request]) -> None:
        self._backend, self._store, self._gate, self._requests = backend, store, gate, requests
        self._replies: list[Reply] = [Reply()] * len(requests)
        self._queue: deque[Job] = deque()
        self._open: Iterator[Job] = iter(())
        self._stopped = ""
        self._in_a_row = 0
        self._ticker: Ticker | None = None

    def open_jobs(self, *, again: bool) -> Iterator[Job]:
        """The jobs that need a call, one a request; where answers are kept, equal requests share one.

        A few hundred requests at a time are planned and looked for in the cache, when the jobs before them are taken:
        the first call begins at once, however many there are. ``again``: failures that the cache has are called again.
        """
        known: dict[object, Job] = {}
        for start in range(0, len(self._requests), AT_ONCE):
            planned = []
            for place, request in enumerate(self._requests[start : start + AT_ONCE], start):
                call = instructed(request)
                key = key_of(self._backend.identity, call) if self._store else b""
                earlier = known.get(key or place)
                if earlier is None:
                    planned.append(Job(request, [place], call, key))
                    known[key or place] = planned[-1]
                elif earlier.done:
                    self._repeat(earlier, place)
                else:
                    earlier.places.append(place)
            yield from self._look_up(planned, again=again)

    def _look_up(self, jobs: list[Job], *, again: bool) -> list[Job]:
        """Take from the cache what it has; returns the jobs that need a call."""
        if self._store is None:
            return jobs
        open_jobs, asked = [], jobs
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
                elif (reply := self._advance(job, answer)) is None:
                    going.append(job)
                elif again and reply.error:  # the limit on attempts is another one now
                    job.prompt_tokens -= answer.prompt_tokens
                    job.completion_tokens -= answer.completion_tokens
                    open_jobs.append(job)
                else:
                    self._reply(job, reply)
            asked = going
        return sorted(open_jobs, key=lambda job: job.places[0])

    async def run(self, ticker: Ticker, *, again: bool) -> list[Reply]:
        """Call for what is open, and give all replies."""
        self._open, self._ticker = self.open_jobs(again=again), ticker
        number = min(self._gate.limits.concurrency, len(self._requests))
        workers: list[asyncio.Future[None]] = []
        try:
            for _ in range(number):
                workers.append(asyncio.ensure_future(self._work()))
                await asyncio.sleep(0)  # so that the first call leaves before the last connection is made
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await self._backend.close()
        for job in (*self._queue, *self._open):
            self._reply(job, Reply(error=f"not answered: {self._stopped}"))
        return self._replies

    async def _work(self) -> None:
        while not self._stopped and (jobs := self._take()):
            try:
                await self._call(jobs)
            except Stopped as stop:
                self._stopped = self._stopped or str(stop)
                self._queue.extendleft(reversed(jobs))

    def _take(self) -> list[Job]:
        """The next jobs, as many as one call takes and the budget allows, but at least one; none when all are taken."""
        self._queue.extend(islice(self._open, max(0, self._backend.group - len(self._queue))))
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
            answers = await self._gate.call(
                self._size(jobs), lambda: self._backend.answer([job.call for job in jobs]), _taken
            )
            self._in_a_row = 0
        except CallFailed as failed:
            answers = [failed] * len(jobs)
            self._in_a_row += failed.again
            if self._in_a_row >= max(FAILURES_IN_A_ROW, 2 * self._gate.limits.concurrency):
                why = f"{self._in_a_row} calls failed one after another, the last with: {failed.reason}"
                self._stopped = self._stopped or why
        kept, going = [], []
        for job, answer in zip(jobs, answers):
            job.called = True
            key, asked = job.key, job.asked
            if isinstance(answer, CallFailed):
                kept.append(StoredAnswer(key, asked, Answer("", 0, 0), answer.reason))
                self._fail(job, answer.reason)
                continue
            reply = self._advance(job, answer)
            kept.append(StoredAnswer(key, asked, answer, reply.error if reply else ""))
            if reply is None:
                going.append(job)
            else:
                self._reply(job, reply)
        if self._store is not None:
            self._store.keep(self._backend.identity, kept)
        self._queue.extendleft(reversed(going))

    def _advance(self, job: Job, answer: Answer) -> Reply | None:
        """Take an answer: the reply that it makes, or None if the job goes on with another attempt."""
        job.prompt_tokens += answer.prompt_tokens
        job.completion_tokens += answer.completion_tokens
        reply = Reply(answer.text, job.prompt_tokens, job.completion_tokens, cached=not job.called, cut=answer.cut)
        if job.asked.schema is None:
            return reply
        data, wrong = read_json(answer.text, job.asked.schema, cut=answer.cut)
        if not wrong:
            return replace(reply, data=data)
        if job.attempt >= self._gate.limits.schema_attempts:
            tried = f"{job.attempt} attempts" if job.attempt > 1 else "one attempt"
            return replace(reply, error=f"no answer that fits the schema in {tried}; of the last one: {wrong}")
        job.attempt += 1
        job.call = corrected(job.call, answer.text, wrong)
        job.key = key_of(self._backend.identity, job.call) if self._store else b""
        return None

    def _fail(self, job: Job, reason: str) -> None:
        self._reply(job, Reply("", job.prompt_tokens, job.completion_tokens, error=reason))

    def _reply(self, job: Job, reply: Reply) -> None:
        job.done = True
        first, *others = job.places
        self._replies[first] = reply
        for place in others:
            self._replies[place] = replace(reply, cached=True)
        if self._ticker is not None:
            spent = self._gate.meter.spent
            self._ticker.count(len(job.places), failed=bool(reply.error), called=job.called, spent=spent)

    def _repeat(self, job: Job, place: int) -> None:
        """Give a request the reply of an equal one before it."""
        reply = self._replies[job.places[0]]
        self._replies[place] = replace(reply, cached=True)
        if self._ticker is not None:
            self._ticker.count(1, failed=bool(reply.error), called=False, spent=self._gate.meter.spent)


def _taken(answers: Sequence[Answer | CallFailed]) -> tuple[int, int]:
    given = [answer for answer in answers if isinstance(answer, Answer)]
    return sum(answer.prompt_tokens for answer in given), sum(answer.completion_tokens for answer in given)
