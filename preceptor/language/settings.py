"""Which language model a recipe talks to, as settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from preceptor.errors import UserError
from preceptor.language.chat import Chat
from preceptor.language.endpoint import Endpoint, check_key_variable
from preceptor.language.limits import Budget, Limits
from preceptor.language.messages import Backend
from preceptor.language.scripted import Echo


@dataclass(frozen=True)
class ChatSettings:
    """Which language model is asked, and what it may cost."""

    model: str = "smollm2"
    """A local model (``smollm2``, a folder, a name on the hub), ``echo``, or with ``base_url`` a model's name there."""
    base_url: str = ""
    """Address of an OpenAI-compatible endpoint, such as ``http://127.0.0.1:8000/v1``; empty asks a local model."""
    key_variable: str = ""
    """Name of the environment variable that holds the endpoint's key; empty where none is needed."""
    native_schema: bool = False
    """Send schemas to the endpoint as ``response_format`` too; not every server knows it."""
    batch_size: int = 16
    """Requests that a local model answers at once."""
    cache: str = ""
    """SQLite file that keeps every answer; empty keeps none."""
    budget: Budget = field(default_factory=Budget)
    """What may be spent."""
    limits: Limits = field(default_factory=Limits)
    """How fast and how often is asked."""

    def __post_init__(self) -> None:
        """Refuses a key where a variable's name belongs, before the settings are written anywhere."""
        check_key_variable(self.key_variable)


def open_chat(settings: ChatSettings, *, shown: bool = True) -> Chat:
    """The chat that the settings describe; a local model is loaded. ``shown``: whether it shows its progress.

    Raises:
        UserError: the model cannot be loaded, the endpoint's address or key is missing, a package is missing, or the
            cache is something else.
    """
    backend, cache = _backend(settings), settings.cache or None
    return Chat(backend, cache=cache, budget=settings.budget, limits=settings.limits, shown=shown)


def _backend(settings: ChatSettings) -> Backend:
    if settings.base_url:
        return Endpoint(
            settings.base_url,
            settings.model,
            key_variable=settings.key_variable,
            native_schema=settings.native_schema,
        )
    if settings.key_variable:
        raise UserError("key_variable is set but base_url is not: give the endpoint's address, or leave both empty.")
    if settings.model == "echo":
        return Echo()
    try:
        from preceptor.language.local import LocalModel
    except ModuleNotFoundError as error:
        raise UserError(
            f'A local model needs the package {error.name}: run `pip install "preceptor[text]"`, or set base_url to '
            "ask an endpoint."
        ) from error
    return LocalModel(settings.model, batch_size=settings.batch_size)
