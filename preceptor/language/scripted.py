"""Backends that need no model: answers from a function or a list, and an echo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from preceptor.language.messages import Answer, CallFailed, Request


class Scripted:
    """Answers from a function of the request, or from a list, taken in the order of asking.

    ``name`` stands in the cache for the script: give another one when the script changes. A function may raise
    ``CallFailed``; a list that has run out answers no more. Either way those replies carry the error. Answers are
    given whole, however long; a token is a word.
    """

    group = 1

    def __init__(self, answer: Callable[[Request], str] | Sequence[str], name: str = "scripted") -> None:
        self.identity = f"scripted {name}"
        self._answer = answer
        self._taken = 0

    def prompt_bound(self, request: Request) -> int:
        """The words of the messages."""
        return _words(request)

    async def answer(self, requests: Sequence[Request]) -> list[Answer | CallFailed]:
        """The script's answers."""
        texts = [(request, self._say(request)) for request in requests]
        return [Answer(text, _words(request), len(text.split())) for request, text in texts]

    async def close(self) -> None:
        """Nothing is open."""

    def _say(self, request: Request) -> str:
        if callable(self._answer):
            return self._answer(request)
        if self._taken >= len(self._answer):
            raise CallFailed(f"the script has only {len(self._answer)} answers")
        self._taken += 1
        return self._answer[self._taken - 1]


class Echo:
    """Repeats the last message, cut to ``max_tokens`` words; a token is a word."""

    identity = "echo"
    group = 1

    def prompt_bound(self, request: Request) -> int:
        """The words of the messages."""
        return _words(request)

    async def answer(self, requests: Sequence[Request]) -> list[Answer | CallFailed]:
        """The last message's content."""
        return [_echo(request) for request in requests]

    async def close(self) -> None:
        """Nothing is open."""


def _echo(request: Request) -> Answer:
    text = request.messages[-1]["content"]
    words = text.split()
    cut = len(words) > request.max_tokens
    if cut:
        text = " ".join(words[: request.max_tokens])
    return Answer(text, _words(request), len(text.split()), cut)


def _words(request: Request) -> int:
    return sum(len(message["content"].split()) for message in request.messages)
