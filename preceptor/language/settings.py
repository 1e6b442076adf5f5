"""Which language model a recipe talks to, as settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from preceptor.errors import UserError
from preceptor.language.chat import Chat
from preceptor.language.limits import Budget, Limits
from preceptor.language.scripted import Echo


@dataclass(frozen=True)
class ChatSettings:
    """Which language model is asked, and what it may cost."""

    model: str = "smollm2"
    """A local model (``smollm2``, a folder, a name on the hub), ``echo``, or with ``base_url`` a model's name there."""
    base_url: str = ""
    """Address of an OpenAI-compatible endpoint, such as ``https://api.openai.com/v1``; empty asks a local model."""
    key_variable: str = ""
    """Name of the environment variable that holds the endpoint's key; empty where none is needed."""
    cache: str = ""
    """SQLite file that keeps every answer; empty keeps none."""
    budget: Budget = field(default_factory=Budget)
    """What may be spent."""
    limits: Limits = field(default_factory=Limits)
    """How fast and how often is asked."""


def open_chat(settings: ChatSettings) -> Chat:
    """The chat that the settings describe."""
    if settings.model != "echo":
        raise UserError(f'The model "{settings.model}" cannot be asked yet.')
    return Chat(Echo(), cache=settings.cache or None, budget=settings.budget, limits=settings.limits)
