"""A chat: a backend, with the answers that it gave, what it may cost, and how fast it is asked."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from preceptor.data.readers import Message
from preceptor.errors import UserError
from preceptor.language.asking import Asking
from preceptor.language.gate import Gate, Scorer, Stopped
from preceptor.language.limits import Budget, Limits, Meter, Pace, Spent
from preceptor.language.messages import Backend, CallFailed, Reply, Request
from preceptor.language.progress import Ticker
from preceptor.language.store import Store
from preceptor.language.structured import check_schema

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """What an ``ask`` would come to, if every request is answered at the first attempt."""

    requests: int
    cached: int
    """Requests that need no call."""
    most: Spent
    """Calls, tokens and money of the others, at most: every answer as long as it may be."""


class Chat:
    """One way to ask, whatever answers.

    Args:
        backend: who answers.
        cache: the SQLite file that keeps every answer, and every failure with its reason; None keeps none.
        budget: what may be spent while this object lives.
        limits: how fast, how often and how long is asked.
        shown: whether long work shows its progress on standard error.

    Raises:
        UserError: the cache is something else, or cannot be written.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        cache: str | Path | None = None,
        budget: Budget | None = None,
        limits: Limits | None = None,
        shown: bool = True,
    ) -> None:
        self.backend = backend
        self.budget, self.limits = budget or Budget(), limits or Limits()
        self._meter, self._pace, self._draw = Meter(self.budget), Pace(self.limits), random.Random()
        self._store = Store(Path(cache)) if cache else None
        self._shown = shown

    @property
    def spent(self) -> Spent:
        """Calls, tokens and money spent so far."""
        return self._meter.spent

    def ask(self, requests: Sequence[Request], *, again: bool = True) -> list[Reply]:
        """The replies, in the order of the requests.

        What the cache has costs no call, and equal requests share one where there is a cache; every answer is kept
        before the next call begins. A reply without an answer has its reason in ``error``: the call failed, no attempt
        fitted the schema, or it was not asked because the budget or the time was used up. With ``again`` requests that
        failed in an earlier run are asked once more, they alone; without, their replies carry the reason kept.

        Raises:
            UserError: before anything was answered: no such model, a refused key, no server, a schema that is none;
                or the cache cannot be written any more.
        """
        asking = self._asking(requests)
        ticker = Ticker(len(requests), self.budget, self.spent, shown=self._shown)
        try:
            return _run(asking.run(ticker, again=again))
        finally:
            ticker.close()

    def estimate(self, requests: Sequence[Request]) -> Estimate:
        """What ``ask`` would come to at most, without a call."""
        asking = self._asking(requests)
        open_jobs = list(asking.open_jobs(again=True))
        prompt = sum(self.backend.prompt_bound(job.call) for job in open_jobs)
        completion = sum(job.call.max_tokens for job in open_jobs)
        most = Spent(len(open_jobs), prompt, completion, self.budget.price(prompt, completion))
        return Estimate(len(requests), len(requests) - len(open_jobs), most)

    def failures(self) -> list[tuple[Request, str]]:
        """The requests to this backend that have no answer in the cache, each with the reason; ``ask`` takes them."""
        return self._store.failures(self.backend.identity) if self._store is not None else []

    def log_probabilities(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[tuple[float, ...]]:
        """The log-probability of each token of each continuation as the assistant's answer, in nats.

        A continuation's own log-probability is the sum over its tokens; the end of the turn is not among them. Local
        models give it exactly; an endpoint where its server does. Nothing of this is kept in the cache.

        Raises:
            UserError: the backend gives none, the budget is used up, or the call failed.
        """
        if not isinstance(self.backend, Scorer):
            raise UserError(
                f'The backend "{self.backend.identity}" gives no log-probabilities: ask a local model, or an endpoint '
                "that knows prompt_logprobs (vLLM)."
            )
        if not continuations:
            return []
        return _run(self._score(self.backend, messages, continuations))

    def close(self) -> None:
        """Close the cache."""
        if self._store is not None:
            self._store.close()

    def __enter__(self) -> Chat:
        """The chat itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the cache."""
        self.close()

    def _asking(self, requests: Sequence[Request]) -> Asking:
        for schema in {id(request.schema): request.schema for request in requests}.values():
            if schema is not None:
                check_schema(schema)
        return Asking(self.backend, self._store, self._gate(), requests)

    def _gate(self) -> Gate:
        seconds = self.limits.total_seconds
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        return Gate(self._meter, self._pace, self.limits, self._draw, deadline)

    async def _score(
        self, scorer: Scorer, messages: Sequence[Message], continuations: Sequence[str]
    ) -> list[tuple[float, ...]]:
        whole = [Request((*messages, {"role": "assistant", "content": text}), max_tokens=1) for text in continuations]
        prompt = sum(self.backend.prompt_bound(request) for request in [Request(tuple(messages)), *whole])
        try:
            if lacks := self._meter.lacks(1 + len(whole), prompt, 1 + len(whole)):
                raise Stopped(lacks)  # nothing is spent on a part of them
            return await scorer.log_probabilities(messages, continuations, self._gate())
        except (CallFailed, Stopped) as error:
            raise UserError(f"No log-probabilities of the given continuations: {error}.") from error
        finally:
            await self.backend.close()


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, also where the caller's thread is running an event loop of its own, as a notebook's does."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(loop.run_until_complete, task)
        try:
            return running.result()
        except KeyboardInterrupt:
            loop.call_soon_threadsafe(task.cancel)
            raise
        finally:
            wait([running])
            loop.close()
