"""Ask a backend many things at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from preceptor.language.limits import Budget, Limits
from preceptor.language.messages import Backend, Reply, Request


class Chat:
    """One way to ask, whatever answers."""

    def __init__(
        self,
        backend: Backend,
        *,
        cache: str | Path | None = None,
        budget: Budget | None = None,
        limits: Limits | None = None,
        shown: bool = False,
    ) -> None:
        self.backend = backend
        self.budget, self.limits = budget or Budget(), limits or Limits()

    def ask(self, requests: Sequence[Request]) -> list[Reply]:
        """Replies in the order of the requests."""
        return [asyncio.run(self._answer(request)) for request in requests]

    async def _answer(self, request: Request) -> Reply:
        try:
            [answer] = await self.backend.answer([request])
        except ValueError as error:
            return Reply(error=str(error))
        return Reply(answer.text, answer.prompt_tokens, answer.completion_tokens)
