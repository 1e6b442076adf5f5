"""What is asked of a language model and what it answers, and what a backend has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from preceptor.data.readers import Message
from preceptor.errors import UserError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Request:
    """One thing to ask. Two requests with equal fields are the same request, to the cache too."""

    messages: tuple[Message, ...]
    """The conversation so far: ``{"role": "system" | "user" | "assistant", "content": ...}`` each."""
    max_tokens: int = 256
    """Tokens that the answer may have at most."""
    temperature: float = 0.0
    """0 takes the likeliest token; 1 samples the model's own distribution."""
    seed: int = 0
    """Tells requests apart that are otherwise equal, and seeds sampling where the backend can."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    schema: dict[str, Any] | None = None
    """JSON schema of the answer, which then comes parsed in ``Reply.data``."""

    def __post_init__(self) -> None:
        """Refuses what no model could be asked, with one sentence each."""
        if not self.messages:
            raise UserError("A request has no messages: give at least one, from the user.")
        for message in self.messages:
            if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
                raise UserError(
                    f"A message must have a role ({', '.join(ROLES)}) and a content that is text; this one has the "
                    f"role {message.get('role')!r} and the fields {', '.join(message)}."
                )
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at least 1.")
        if not self.temperature >= 0:
            raise UserError(f"The temperature is {self.temperature}; it must be 0 (greedy) or positive.")


@dataclass(frozen=True)
class Reply:
    """What came back for one request: an answer, or the reason why there is none."""

    text: str = ""
    """The model's text; for a structured answer that could not be read, its last attempt."""
    prompt_tokens: int = 0
    """Tokens read, over all attempts at a structured answer; as the backend counts them."""
    completion_tokens: int = 0
    """Tokens written, over all attempts at a structured answer."""
    data: Any = None
    """The parsed answer, when the request has a schema and the answer fits it."""
    error: str = ""
    """Why there is no answer; empty where there is one."""
    cached: bool = False
    """Whether no call was made for it."""
    cut: bool = False
    """Whether the answer ended because it had ``max_tokens`` tokens."""


@dataclass(frozen=True)
class Answer:
    """A backend's answer to one request."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    cut: bool = False
    """Whether it ended because it had ``max_tokens`` tokens."""


class CallFailed(Exception):
    """A call has no answer.

    ``reason``: why, without any key. ``again``: whether the same call may succeed later. ``wait``: seconds that the
    endpoint asks to wait first. ``charged``: whether it may have been charged for (no answer came), and is counted at
    the most that it can have come to. ``status``: of HTTP, where the endpoint refused; else 0.
    """

    def __init__(
        self, reason: str, *, again: bool = False, wait: float | None = None, charged: bool = False, status: int = 0
    ) -> None:
        super().__init__(reason)
        self.reason, self.again, self.wait, self.charged, self.status = reason, again, wait, charged, status


class Backend(Protocol):
    """Something that answers requests.

    ``identity`` names everything beside the request that an answer depends on (kind, endpoint, model), for the cache;
    no key is ever part of it. ``group``: how many requests one call takes at most.
    """

    @property
    def identity(self) -> str: ...  # noqa: D102

    @property
    def group(self) -> int: ...  # noqa: D102

    def prompt_bound(self, request: Request) -> int:
        """Tokens that the request's messages have at most."""
        ...

    async def answer(self, requests: Sequence[Request]) -> list[Answer | CallFailed]:
        """One answer for each of at most ``group`` requests, in order, or why that one has none.

        Raises:
            CallFailed: none of them has an answer, for a reason that the error tells.
            UserError: no call can have one: no such model, a refused key.
        """
        ...

    async def close(self) -> None:
        """Let go of connections; the next call opens new ones."""
        ...
