"""What is asked of a language model and what it answers, and what a backend has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from preceptor.errors import UserError
from preceptor.readers import Message

__all__ = ["Answer", "Backend", "Message", "Reply", "Request"]

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
    """What the model said; for a structured answer that could not be read, its last attempt."""
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


@dataclass(frozen=True)
class Answer:
    """What a backend says to one request."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Backend(Protocol):
    """Something that answers requests.

    ``identity`` names everything beside the request that an answer depends on (kind, endpoint, model), for the cache;
    no key is ever part of it. ``group``: how many requests one call takes at most.
    """

    identity: str
    group: int

    async def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each of at most ``group`` requests, in order.

        Raises:
            CallFailed: this call has no answer, for a reason that the error tells.
            UserError: no call can have one: no such model, a refused key.
        """
        ...
