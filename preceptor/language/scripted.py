"""Backends that need no model: answers from a function or a list, and an echo."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from preceptor.language.messages import Answer, Request


class Scripted:
    """Answers from a function of the request, or from a list, taken in the order of asking.

    ``name`` stands in the cache for the function: give another one when the function changes. A list that has run out
    answers no more: those replies carry an error.
    """

    group = 1

    def __init__(self, answer: Callable[[Request], str] | Sequence[str], name: str = "scripted") -> None:
        self.identity = f"scripted {name}"
        self._answer = answer
        self._taken = 0

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The script's answers; a token is a word."""
        return [
            Answer(text, _read(request), len(text.split())) for request in requests for text in [self._say(request)]
        ]

    def _say(self, request: Request) -> str:
        if callable(self._answer):
            return self._answer(request)
        if self._taken >= len(self._answer):
            raise ValueError(f"the script has only {len(self._answer)} answers")
        self._taken += 1
        return self._answer[self._taken - 1]


class Echo:
    """Says the last message again."""

    identity = "echo"
    group = 1

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The last message's content, cut to ``max_tokens`` words; a token is a word."""
        said = [request.messages[-1]["content"] for request in requests]
        cut = [
            text if len(text.split()) <= request.max_tokens else " ".join(text.split()[: request.max_tokens])
            for text, request in zip(said, requests)
        ]
        return [Answer(text, _read(request), len(text.split())) for text, request in zip(cut, requests)]


def _read(request: Request) -> int:
    return sum(len(message["content"].split()) for message in request.messages)
